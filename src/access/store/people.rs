//! Accounts, their provider identities and their second factors.

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::error::Error;
use crate::ids::{AccountId, AccountName};

/// The data that a sign-in needs.
pub(in crate::access) struct ForSignIn {
    pub(in crate::access) id: i64,
    pub(in crate::access) name: String,
    pub(in crate::access) password: Option<String>,
    pub(in crate::access) disabled: bool,
    pub(in crate::access) second_factor: bool,
}

pub(in crate::access) async fn find_for_sign_in(
    conn: &mut PgConnection,
    name: &str,
) -> Result<Option<ForSignIn>, Error> {
    Ok(sqlx::query_as!(
        ForSignIn,
        r#"SELECT a.id, a.name, a.password, a.disabled_at IS NOT NULL AS "disabled!",
           EXISTS (SELECT 1 FROM second_factor f WHERE f.account_id = a.id AND f.confirmed_at IS NOT NULL)
             AS "second_factor!"
           FROM account a WHERE a.name = $1"#,
        name
    )
    .fetch_optional(conn)
    .await?)
}

/// Whether password, second factor and enabled state are unchanged since a password was verified. The lock
/// keeps them unchanged until the session starts.
pub(in crate::access) async fn is_unchanged(
    conn: &mut PgConnection,
    before: &ForSignIn,
) -> Result<bool, Error> {
    let row = sqlx::query!(
        r#"SELECT a.password, a.disabled_at IS NOT NULL AS "disabled!",
           EXISTS (SELECT 1 FROM second_factor f WHERE f.account_id = a.id AND f.confirmed_at IS NOT NULL)
             AS "second_factor!"
           FROM account a WHERE a.id = $1 FOR SHARE OF a"#,
        before.id
    )
    .fetch_one(conn)
    .await?;
    Ok(row.password == before.password && !row.disabled && row.second_factor == before.second_factor)
}

pub(in crate::access) async fn find_account_id(
    conn: &mut PgConnection,
    name: &AccountName,
) -> Result<Option<AccountId>, Error> {
    let id = sqlx::query_scalar!("SELECT id FROM account WHERE name = $1", name.as_str())
        .fetch_optional(conn)
        .await?;
    Ok(id.map(AccountId))
}

/// Returns an account's name, and whether the account is disabled.
pub(in crate::access) async fn find_name(
    conn: &mut PgConnection,
    account: AccountId,
) -> Result<Option<(String, bool)>, Error> {
    let row = sqlx::query!(
        r#"SELECT name, disabled_at IS NOT NULL AS "disabled!" FROM account WHERE id = $1"#,
        account.0
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| (row.name, row.disabled)))
}

/// Returns the platform role and its source.
pub(in crate::access) async fn platform_standing(
    conn: &mut PgConnection,
    account: AccountId,
) -> Result<(Option<String>, String), Error> {
    let row = sqlx::query!("SELECT platform_role, platform_source FROM account WHERE id = $1", account.0)
        .fetch_one(conn)
        .await?;
    Ok((row.platform_role, row.platform_source))
}

/// Lists the issuers of an account's provider identities.
pub(in crate::access) async fn list_issuers(
    conn: &mut PgConnection,
    account: AccountId,
) -> Result<Vec<String>, Error> {
    Ok(sqlx::query_scalar!(
        "SELECT DISTINCT issuer FROM account_identity WHERE account_id = $1 ORDER BY 1",
        account.0
    )
    .fetch_all(conn)
    .await?)
}

/// An account as shown.
#[derive(Debug, Clone, Serialize)]
pub(in crate::access) struct AccountRow {
    #[serde(skip)]
    pub(in crate::access) id: i64,
    pub(in crate::access) name: String,
    pub(in crate::access) display_name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::access) platform_role: Option<String>,
    pub(in crate::access) password: bool,
    pub(in crate::access) second_factor: bool,
    pub(in crate::access) providers: Vec<String>,
    #[serde(with = "time::serde::rfc3339")]
    pub(in crate::access) created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub(in crate::access) last_seen_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub(in crate::access) disabled_at: Option<OffsetDateTime>,
}

/// Lists accounts ordered by name, after `after`. `only` restricts the list to one name.
pub(in crate::access) async fn list_accounts(
    conn: &mut PgConnection,
    after: &str,
    only: Option<&str>,
    limit: i64,
) -> Result<Vec<AccountRow>, Error> {
    Ok(sqlx::query_as!(
        AccountRow,
        r#"SELECT a.id, a.name, a.display_name, a.platform_role, a.password IS NOT NULL AS "password!",
           EXISTS (SELECT 1 FROM second_factor f WHERE f.account_id = a.id AND f.confirmed_at IS NOT NULL)
             AS "second_factor!",
           ARRAY(SELECT i.issuer FROM account_identity i WHERE i.account_id = a.id ORDER BY 1) AS "providers!",
           a.created_at, (SELECT max(s.last_seen_at) FROM session s WHERE s.account_id = a.id) AS last_seen_at,
           a.disabled_at
           FROM account a WHERE a.name > $1 AND ($2::text IS NULL OR a.name = $2) ORDER BY a.name LIMIT $3"#,
        after,
        only,
        limit
    )
    .fetch_all(conn)
    .await?)
}

pub(in crate::access) async fn insert_account(
    conn: &mut PgConnection,
    name: &AccountName,
    display_name: &str,
    password: Option<&str>,
    platform_role: Option<&str>,
) -> Result<AccountId, Error> {
    let done = sqlx::query_scalar!(
        "INSERT INTO account (name, display_name, password, password_changed_at, platform_role) \
         VALUES ($1, $2, $3, CASE WHEN $3::text IS NOT NULL THEN now() END, $4) RETURNING id",
        name.as_str(),
        display_name,
        password,
        platform_role
    )
    .fetch_one(conn)
    .await;
    match done {
        Ok(id) => Ok(AccountId(id)),
        Err(error) if crate::db::constraint(&error) == Some("account_name_is_taken") => {
            Err(Error::AlreadyExists("an account of this name exists".into()))
        }
        Err(error) => Err(error.into()),
    }
}

pub(in crate::access) async fn set_password(
    conn: &mut PgConnection,
    account: AccountId,
    password: &str,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE account SET password = $2, password_changed_at = now() WHERE id = $1",
        account.0,
        password
    )
    .execute(&mut *conn)
    .await?;
    sqlx::query_scalar!("SELECT access_end_resets($1)", account.0).fetch_one(conn).await?;
    Ok(())
}

/// Replaces a hash by a stronger one, unless the password has changed.
pub(in crate::access) async fn strengthen_password(
    conn: &mut PgConnection,
    account: AccountId,
    old: &str,
    new: &str,
) -> Result<(), Error> {
    sqlx::query!("UPDATE account SET password = $3 WHERE id = $1 AND password = $2", account.0, old, new)
        .execute(conn)
        .await?;
    Ok(())
}

pub(in crate::access) async fn set_platform_role(
    conn: &mut PgConnection,
    account: AccountId,
    role: Option<&str>,
    source: &str,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE account SET platform_role = $2, platform_source = $3 WHERE id = $1",
        account.0,
        role,
        source
    )
    .execute(conn)
    .await?;
    Ok(())
}

pub(in crate::access) async fn set_disabled(
    conn: &mut PgConnection,
    account: AccountId,
    disabled: bool,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE account SET disabled_at = CASE WHEN $2 THEN coalesce(disabled_at, now()) END WHERE id = $1",
        account.0,
        disabled
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Counts the admins that can sign in, under a lock: if two admins remove each other, one stays.
pub(in crate::access) async fn count_admins(conn: &mut PgConnection) -> Result<i64, Error> {
    let ids = sqlx::query_scalar!(
        "SELECT id FROM account WHERE platform_role = 'admin' AND disabled_at IS NULL \
         AND (platform_source IN ('local', 'hand') OR access_is_vouched_for(id)) ORDER BY id FOR UPDATE"
    )
    .fetch_all(conn)
    .await?;
    Ok(i64::try_from(ids.len()).unwrap_or(i64::MAX))
}

/// The sealed secret, and whether the factor is active.
pub(in crate::access) struct Factor {
    pub(in crate::access) sealed: Vec<u8>,
    pub(in crate::access) confirmed: bool,
}

pub(in crate::access) async fn find_factor(
    conn: &mut PgConnection,
    account: AccountId,
) -> Result<Option<Factor>, Error> {
    Ok(sqlx::query_as!(
        Factor,
        r#"SELECT sealed, confirmed_at IS NOT NULL AS "confirmed!" FROM second_factor WHERE account_id = $1"#,
        account.0
    )
    .fetch_optional(conn)
    .await?)
}

/// Starts a second factor, in place of one that is not confirmed. Returns false if a confirmed one exists.
pub(in crate::access) async fn begin_factor(
    conn: &mut PgConnection,
    account: AccountId,
    sealed: &[u8],
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "INSERT INTO second_factor AS f (account_id, sealed) VALUES ($1, $2) \
         ON CONFLICT (account_id) DO UPDATE SET sealed = $2, last_step = 0, created_at = now() \
         WHERE f.confirmed_at IS NULL",
        account.0,
        sealed
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Uses a time step up. Of two requests with the same code, on any replica, one succeeds.
pub(in crate::access) async fn use_step(
    conn: &mut PgConnection,
    account: AccountId,
    step: i64,
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE second_factor SET last_step = $2, confirmed_at = coalesce(confirmed_at, now()) \
         WHERE account_id = $1 AND last_step < $2",
        account.0,
        step
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

pub(in crate::access) async fn insert_recovery_codes(
    conn: &mut PgConnection,
    account: AccountId,
    hashes: &[Vec<u8>],
) -> Result<(), Error> {
    sqlx::query!("DELETE FROM recovery_code WHERE account_id = $1", account.0).execute(&mut *conn).await?;
    sqlx::query!(
        "INSERT INTO recovery_code (account_id, hash) SELECT $1, h FROM unnest($2::bytea[]) AS x (h)",
        account.0,
        hashes
    )
    .execute(conn)
    .await?;
    Ok(())
}

pub(in crate::access) async fn use_recovery_code(
    conn: &mut PgConnection,
    account: AccountId,
    hash: &[u8],
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE recovery_code SET used_at = now() WHERE account_id = $1 AND hash = $2 AND used_at IS NULL",
        account.0,
        hash
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

pub(in crate::access) async fn count_recovery_codes(
    conn: &mut PgConnection,
    account: AccountId,
) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT count(*) AS "n!" FROM recovery_code WHERE account_id = $1 AND used_at IS NULL"#,
        account.0
    )
    .fetch_one(conn)
    .await?)
}

pub(in crate::access) async fn delete_factor(
    conn: &mut PgConnection,
    account: AccountId,
) -> Result<bool, Error> {
    let done =
        sqlx::query!("DELETE FROM second_factor WHERE account_id = $1", account.0).execute(conn).await?;
    Ok(done.rows_affected() == 1)
}

/// Returns the account with this provider identity.
pub(in crate::access) async fn find_identity(
    conn: &mut PgConnection,
    issuer: &str,
    subject: &str,
) -> Result<Option<(AccountId, String, bool)>, Error> {
    let row = sqlx::query!(
        r#"UPDATE account_identity i SET last_used_at = now() FROM account a
           WHERE i.issuer = $1 AND i.subject = $2 AND a.id = i.account_id
           RETURNING a.id, a.name, a.disabled_at IS NOT NULL AS "disabled!""#,
        issuer,
        subject
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| (AccountId(row.id), row.name, row.disabled)))
}

pub(in crate::access) async fn insert_identity(
    conn: &mut PgConnection,
    issuer: &str,
    subject: &str,
    account: AccountId,
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "INSERT INTO account_identity (issuer, subject, account_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        issuer,
        subject,
        account.0
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Deletes the provider identities of an account for one issuer, or for all (`None`). Returns their number.
pub(in crate::access) async fn delete_identities(
    conn: &mut PgConnection,
    account: AccountId,
    issuer: Option<&str>,
) -> Result<u64, Error> {
    let done = sqlx::query!(
        "DELETE FROM account_identity WHERE account_id = $1 AND ($2::text IS NULL OR issuer = $2)",
        account.0,
        issuer
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected())
}
