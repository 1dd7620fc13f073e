//! `Idempotency-Key`: a POST that is sent again is answered again and not done again.

use actix_web::HttpRequest;
use actix_web::http::StatusCode;
use serde_json::Value;
use sqlx::PgConnection;

use super::{Actor, credentials, store};
use crate::error::Error;

/// A request as far as repetition is concerned.
#[derive(Debug)]
pub struct Once {
    key: Option<String>,
    hash: Vec<u8>,
}

/// An answer that was given before.
#[derive(Debug)]
pub struct Kept {
    /// Status.
    pub status: StatusCode,
    /// Body.
    pub body: Value,
}

/// Whose key it is: accounts of two tenants may be called alike, a token is one.
fn holder(actor: &Actor) -> String {
    format!("{} {}", actor.id.as_str(), actor.id.via().unwrap_or_default())
}

impl Once {
    /// From the header and the request itself.
    pub fn of(req: &HttpRequest, body: &[u8]) -> Result<Self, Error> {
        let key = match req.headers().get("idempotency-key") {
            None => None,
            Some(value) => Some(
                value
                    .to_str()
                    .ok()
                    .filter(|key| (1..=200).contains(&key.len()))
                    .ok_or_else(|| {
                        Error::Malformed("Idempotency-Key has 1 to 200 visible characters".into())
                    })?
                    .to_owned(),
            ),
        };
        let hash = credentials::hash(&format!(
            "{} {} {}",
            req.method(),
            req.path(),
            data_encoding::HEXLOWER.encode(&credentials::hash(&String::from_utf8_lossy(body)))
        ));
        Ok(Self { key, hash })
    }

    /// The answer that this very request got before; another request under the same key is refused.
    pub async fn kept(&self, conn: &mut PgConnection, actor: &Actor) -> Result<Option<Kept>, Error> {
        let Some(key) = &self.key else { return Ok(None) };
        let Some((hash, status, body)) = store::find_answer(conn, &holder(actor), key).await? else {
            return Ok(None);
        };
        if hash != self.hash {
            return Err(Error::Conflict("this Idempotency-Key was used with another request".into()));
        }
        let status = u16::try_from(status).ok().and_then(|s| StatusCode::from_u16(s).ok());
        Ok(Some(Kept { status: status.unwrap_or(StatusCode::OK), body }))
    }

    /// Keeps the answer in the same transaction. When another one with this key came first, the
    /// transaction must not commit: it is a conflict, and asking again gives the kept answer.
    pub async fn keep(
        &self,
        conn: &mut PgConnection,
        actor: &Actor,
        status: StatusCode,
        body: &Value,
    ) -> Result<(), Error> {
        let Some(key) = &self.key else { return Ok(()) };
        let answer = (i32::from(status.as_u16()), body);
        if store::insert_answer(conn, &holder(actor), key, &self.hash, answer).await? {
            Ok(())
        } else {
            Err(Error::Conflict("the same request is being answered right now; ask again".into()))
        }
    }
}
