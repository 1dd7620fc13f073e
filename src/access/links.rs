//! Links that are used once: an invitation, a new password. The link is shown to whoever made it, to pass on;
//! here is its hash. It names its recipient: nobody else can use it for another account.

use super::credentials::{self, Secret};
use super::sessions::{Client, Desk};
use super::{accounts, store};
use crate::error::Error;
use crate::fault::plain;

/// A link that was made: number and code.
pub struct Made {
    /// Number.
    pub id: i64,
    /// Path below our own address, with the code in it.
    pub path: String,
}

pub(super) fn made(id: i64, kind: &str, secret: &Secret) -> Made {
    Made { id, path: format!("/{kind}/{}", secret.expose()) }
}

/// Where a link leads, for its page.
pub struct Seen {
    /// Whom it is for.
    pub recipient: String,
    /// Whether somebody of that name has an account.
    pub has_account: bool,
    /// The tenant.
    pub tenant: Option<String>,
    /// The role that it gives.
    pub role: Option<String>,
    /// Who made it.
    pub by: String,
    pub(super) kind: Kind,
}

/// What a link is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// To become somebody here.
    Invitation,
    /// To set a new password.
    Reset,
}

/// Name and password of somebody who is new.
pub struct NewPerson<'a> {
    /// For people.
    pub display_name: &'a str,
    /// Password.
    pub password: &'a str,
}

/// Checks a name for people.
pub(super) fn check_display_name(text: &str) -> Result<&str, Error> {
    let text = text.trim();
    let count = text.chars().count();
    if (1..=120).contains(&count) && text.chars().all(|c| plain(c) == c) {
        Ok(text)
    } else {
        Err(accounts::wrong(
            "display_name",
            "a name for people has 1 to 120 characters, and none that controls, hides or turns text",
        ))
    }
}

impl Desk {
    /// What stands behind a code; looking does not use it up.
    pub async fn look_at_link(&self, client: &Client, code: &str) -> Result<Seen, Error> {
        self.throttle.knock("link", client.address).await?;
        let mut conn = self.pool.acquire().await?;
        let link = store::find_link(&mut conn, &credentials::hash(code)).await?.ok_or(Error::NotFound)?;
        let account = match link.recipient.parse() {
            Ok(name) => store::find_account_id(&mut conn, &name).await?,
            Err(_) => None,
        };
        Ok(Seen {
            has_account: account.is_some(),
            kind: if link.kind == "reset" { Kind::Reset } else { Kind::Invitation },
            role: link.role.or(link.platform_role),
            recipient: link.recipient,
            tenant: link.tenant,
            by: link.created_by,
        })
    }
}
