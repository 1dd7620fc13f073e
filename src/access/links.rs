//! Single-use links: invitations and password resets. The creator sees the link once and sends it on; the
//! database holds its hash. A link names its recipient and does not work for another account.

use super::credentials::{self, Secret};
use super::sessions::{Client, Desk};
use super::{accounts, store};
use crate::error::Error;
use crate::fault::plain;

/// A created link: its number and path.
pub struct CreatedLink {
    /// Number.
    pub id: i64,
    /// Path below Bulkhead's own address, with the code in it.
    pub path: String,
}

pub(super) fn made(id: i64, kind: &str, secret: &Secret) -> CreatedLink {
    CreatedLink { id, path: format!("/{kind}/{}", secret.expose()) }
}

/// Content of a link, for its page.
pub struct LinkContent {
    /// Name of the recipient.
    pub recipient: String,
    /// Whether the recipient has an account.
    pub has_account: bool,
    /// The tenant.
    pub tenant: Option<String>,
    /// The role that the link gives.
    pub role: Option<String>,
    /// The actor that created the link.
    pub by: String,
    pub(super) kind: LinkKind,
}

/// Purpose of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkKind {
    /// Creates an account or a membership.
    Invitation,
    /// Sets a new password.
    Reset,
}

/// Name and password of a new user.
pub struct NewPerson<'a> {
    /// Display name.
    pub display_name: &'a str,
    /// Password.
    pub password: &'a str,
}

/// Checks a display name.
pub(super) fn check_display_name(text: &str) -> Result<&str, Error> {
    let text = text.trim();
    let count = text.chars().count();
    if (1..=120).contains(&count) && text.chars().all(|c| plain(c) == c) {
        Ok(text)
    } else {
        Err(accounts::wrong(
            "display_name",
            "a display name must have 1 to 120 characters, without control, invisible or bidirectional characters",
        ))
    }
}

impl Desk {
    /// Returns the content of a link. Does not use the link up.
    pub async fn look_at_link(&self, client: &Client, code: &str) -> Result<LinkContent, Error> {
        self.throttle.knock("link", client.address).await?;
        let mut conn = self.pool.acquire().await?;
        let link = store::find_link(&mut conn, &credentials::hash(code)).await?.ok_or(Error::NotFound)?;
        let account = match link.recipient.parse() {
            Ok(name) => store::find_account_id(&mut conn, &name).await?,
            Err(_) => None,
        };
        Ok(LinkContent {
            has_account: account.is_some(),
            kind: if link.kind == "reset" { LinkKind::Reset } else { LinkKind::Invitation },
            role: link.role.or(link.platform_role),
            recipient: link.recipient,
            tenant: link.tenant,
            by: link.created_by,
        })
    }
}
