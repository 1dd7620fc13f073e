//! The second factor: time-based codes (RFC 6238: SHA-1, six digits, thirty seconds, one step of leeway), each
//! valid once, and recovery codes. The secret is stored sealed.

use sqlx::PgConnection;
use totp_rs::{Algorithm, Builder, Totp};

use super::credentials::{self, Secret};
use super::store;
use crate::error::Error;
use crate::ids::AccountId;
use crate::keys::{KeyPurpose, Keys};

/// Number of recovery codes.
const CODES: usize = 10;

/// Data of a setup, shown once.
pub struct Setup {
    /// The secret in base32, for typing.
    pub secret: String,
    /// The `otpauth:` address, for scanning.
    pub address: String,
}

fn totp(secret: &[u8], account: &str) -> Result<Totp, Error> {
    // A colon separates issuer and account in the address. No account name contains one.
    Builder::new()
        .with_algorithm(Algorithm::SHA1)
        .with_digits(6)
        .with_skew(1)
        .with_step_duration(30)
        .with_secret(secret.to_vec())
        .with_account_name(account.to_owned())
        .with_issuer(Some("Bulkhead".to_owned()))
        .build()
        .map_err(|error| Error::internal(error.to_string()))
}

fn place(account: AccountId) -> String {
    format!("second factor of account {account}")
}

/// Starts the setup. The first valid code activates the factor.
pub async fn begin(
    conn: &mut PgConnection,
    keys: &Keys,
    account: AccountId,
    name: &str,
) -> Result<Setup, Error> {
    let secret: [u8; 20] = rand::random();
    let sealed = keys.seal(KeyPurpose::SecondFactor, &place(account), &secret)?;
    if !store::begin_factor(conn, account, &sealed).await? {
        return Err(Error::Conflict("a second factor exists already; remove it first".into()));
    }
    let address = totp(&secret, name)?.to_url().map_err(|error| Error::internal(error.to_string()))?;
    Ok(Setup { secret: data_encoding::BASE32_NOPAD.encode(&secret), address })
}

/// Checks a code at a time in seconds of the Unix epoch. A code's time step works once.
pub async fn check_code(
    conn: &mut PgConnection,
    keys: &Keys,
    account: AccountId,
    code: &str,
    now: u64,
) -> Result<bool, Error> {
    let Some(factor) = store::find_factor(conn, account).await? else { return Ok(false) };
    let secret = keys.open(KeyPurpose::SecondFactor, &place(account), &factor.sealed)?;
    let code: String = code.chars().filter(|c| !c.is_whitespace()).collect();
    let Some(step) = totp(&secret, "x")?.check(&code, now) else { return Ok(false) };
    store::use_step(conn, account, i64::try_from(step).unwrap_or(i64::MAX)).await
}

/// Checks a code or a recovery code against an active factor.
pub async fn check(
    conn: &mut PgConnection,
    keys: &Keys,
    account: AccountId,
    code: &str,
    now: u64,
) -> Result<bool, Error> {
    if !store::find_factor(conn, account).await?.is_some_and(|factor| factor.confirmed) {
        return Ok(false);
    }
    if check_code(conn, keys, account, code, now).await? {
        return Ok(true);
    }
    store::use_recovery_code(conn, account, &hash_of(account, code)).await
}

fn hash_of(account: AccountId, code: &str) -> Vec<u8> {
    let plain: String = code.chars().filter(char::is_ascii_alphanumeric).collect();
    credentials::hash(&format!("recovery {account} {}", plain.to_ascii_lowercase()))
}

/// Creates new recovery codes, shown once, and revokes earlier ones. Each has 80 random bits, so a plain hash
/// is enough.
pub async fn make_recovery_codes(conn: &mut PgConnection, account: AccountId) -> Result<Vec<String>, Error> {
    let codes: Vec<String> = (0..CODES)
        .map(|_| {
            let secret = Secret::generate("");
            let text = &secret.expose()[..16];
            format!("{}-{}-{}-{}", &text[..4], &text[4..8], &text[8..12], &text[12..])
        })
        .collect();
    let hashes: Vec<Vec<u8>> = codes.iter().map(|code| hash_of(account, code)).collect();
    store::insert_recovery_codes(conn, account, &hashes).await?;
    Ok(codes)
}

/// Returns the seconds since the Unix epoch.
#[must_use]
pub fn now() -> u64 {
    u64::try_from(time::OffsetDateTime::now_utc().unix_timestamp()).unwrap_or(0)
}
