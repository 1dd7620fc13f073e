//! Creation of the first admin, through a single-use link that root on the machine creates.

use serde_json::json;
use sqlx::PgPool;

use super::credentials::{self, Secret};
use super::links::{NewPerson, check_display_name};
use super::sessions::{Client, Desk, note};
use super::{accounts, store};
use crate::db::{self, Within};
use crate::error::Error;
use crate::ids::ActorId;

/// Creates the single-use link for an admin account, as root on the machine, and returns its path. Revokes
/// earlier links.
pub async fn make_link(pool: &PgPool) -> Result<String, Error> {
    let secret = Secret::generate("");
    let mut tx = db::begin(pool, Within::Platform).await?;
    store::replace_first_link(&mut tx, &secret.hash()).await?;
    let root = ActorId::new("root");
    note(&mut tx, None, &root, "account.first_admin_link", "first admin", "command line", json!({})).await?;
    tx.commit().await?;
    Ok(format!("/first-admin/{}", secret.expose()))
}

impl Desk {
    /// Uses the link up, creates the first admin's account and signs in.
    pub async fn become_first_admin(
        &self,
        client: &Client,
        code: &str,
        name: &str,
        person: &NewPerson<'_>,
    ) -> Result<Secret, Error> {
        self.throttle.knock("link", client.address).await?;
        let mut conn = self.pool.acquire().await?;
        if !store::is_first_link_good(&mut conn, &credentials::hash(code)).await? {
            return Err(Error::NotFound);
        }
        drop(conn);
        let name = accounts::account_name("name", name)?;
        let display_name = check_display_name(person.display_name)?;
        let password = self.prepare_password(name.as_str(), person.password).await?;
        let mut tx = db::begin(&self.pool, Within::Platform).await?;
        if !store::use_first_link(&mut tx, &credentials::hash(code)).await? {
            return Err(Error::NotFound);
        }
        let account =
            store::insert_account(&mut tx, &name, display_name, Some(&password), Some("admin")).await?;
        let actor = ActorId::new("first-admin link");
        let detail = json!({"platform_role": "admin"});
        note(&mut tx, None, &actor, "account.create", name.as_str(), &client.request_id, detail).await?;
        let session = self.begin(&mut tx, client, account, name.as_str(), "first-admin link").await?;
        tx.commit().await?;
        Ok(session)
    }

    /// Whether the link for the first admin is valid.
    pub async fn is_first_link_good(&self, client: &Client, code: &str) -> Result<bool, Error> {
        self.throttle.knock("link", client.address).await?;
        let mut conn = self.pool.acquire().await?;
        store::is_first_link_good(&mut conn, &credentials::hash(code)).await
    }
}
