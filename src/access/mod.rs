//! Authorization: one table of permissions, from which the extractors in `extract.rs`, the console and the
//! documentation derive. The extractors are the only way to obtain an [`Actor`], and every route takes one.

use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::audit;
use crate::error::Error;
use crate::ids::{AccountId, ActorId, TenantId, TenantName};

pub mod accounts;
pub mod api;
pub mod console;
pub mod credentials;
pub mod denials;
pub mod extract;
pub mod first_admin;
pub mod idempotency;
pub mod invitations;
pub mod links;
pub mod members;
pub mod oidc;
pub mod passwords;
mod resets;
pub mod second_factor;
pub mod sessions;
mod store;
pub mod throttle;
pub mod tokens;
pub mod turns;

pub use extract::{PlatformScope, Public, SignedIn, TenantScope};
pub use store::{actor_of, has_admin, prune, registry_role};

/// A role within one tenant. Each role includes the ones before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Sees everything in the tenant.
    Viewer,
    /// Deploys, rolls back and deletes apps and images.
    Deployer,
    /// Also manages members and credentials.
    Owner,
}

/// A role on the platform. Each role includes the ones before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PlatformRole {
    /// Sees everything.
    Auditor,
    /// Does everything.
    Admin,
}

macro_rules! names {
    ($role:ident { $($variant:ident: $name:literal),* }) => {
        impl $role {
            /// Names of all roles, lowest first.
            pub const NAMES: &[&str] = &[$($name),*];

            /// Parses the name of a role.
            #[must_use]
            pub fn parse(text: &str) -> Option<Self> {
                match text {
                    $($name => Some(Self::$variant),)*
                    _ => None,
                }
            }
            /// Returns the name of the role.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

names!(Role { Viewer: "viewer", Deployer: "deployer", Owner: "owner" });
names!(PlatformRole { Auditor: "auditor", Admin: "admin" });

/// Scope of an authority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authority {
    /// On the platform.
    Platform(PlatformRole),
    /// In one tenant only.
    Tenant(TenantId, Role),
}

/// The credential that authenticated an actor. It can be checked again, because streams outlast their request.
#[derive(Debug, Clone)]
pub enum Means {
    /// A user's session.
    Session {
        /// Number.
        id: i64,
        /// Hash of the session reference.
        hash: Vec<u8>,
        /// Whether the user confirmed the session within the last ten minutes.
        recent: bool,
    },
    /// An API token.
    Token {
        /// Number.
        id: i64,
        /// Hash.
        hash: Vec<u8>,
        /// Expiry.
        expires_at: OffsetDateTime,
    },
}

/// An authenticated actor.
#[derive(Debug, Clone)]
pub struct Actor {
    /// Id, as recorded in the audit log.
    pub id: ActorId,
    /// Display name.
    pub name: String,
    /// The account. `None` for service accounts and for tokens that root created.
    pub account: Option<AccountId>,
    /// The credential.
    pub means: Means,
    /// Current platform role.
    pub platform: Option<PlatformRole>,
}

impl Actor {
    /// Returns the payer that the actor's requests are charged to.
    #[must_use]
    pub fn payer(&self) -> turns::Payer {
        match (&self.means, self.account) {
            (Means::Token { id, .. }, _) => turns::Payer::Token(*id),
            (Means::Session { .. }, Some(account)) => turns::Payer::Account(account.0),
            (Means::Session { id, .. }, None) => turns::Payer::Account(-*id),
        }
    }

    /// Requires that a session was confirmed within ten minutes, for sensitive actions. Tokens pass: no user
    /// can be asked, and the scope limits what a token may do.
    pub fn require_recent(&self) -> Result<(), Error> {
        match self.means {
            Means::Session { recent: false, .. } => Err(Error::Unconfirmed),
            _ => Ok(()),
        }
    }

    /// Returns the account. Rejects tokens.
    pub fn require_person(&self) -> Result<AccountId, Error> {
        self.require_session().map(|(account, _)| account)
    }

    /// Returns the account and the session number. Rejects tokens.
    pub fn require_session(&self) -> Result<(AccountId, i64), Error> {
        match (&self.means, self.account) {
            (Means::Session { id, .. }, Some(account)) => Ok((account, *id)),
            _ => Err(Error::Forbidden("this needs a signed-in user; a token is not accepted".into())),
        }
    }

    /// Returns the expiry of the actor's token. Credentials that a token creates must not outlive it.
    #[must_use]
    pub fn ends(&self) -> Option<OffsetDateTime> {
        match self.means {
            Means::Token { expires_at, .. } => Some(expires_at),
            Means::Session { .. } => None,
        }
    }
}

/// The actor and the request id.
#[derive(Debug, Clone, Copy)]
pub struct By<'a> {
    /// The actor.
    pub actor: &'a Actor,
    /// Request id.
    pub request_id: &'a str,
}

impl By<'_> {
    /// Records a change on the audit log of a tenant, or of the platform (`None`), within the transaction of
    /// the change.
    pub async fn record(
        self,
        conn: &mut PgConnection,
        tenant: impl Into<Option<TenantId>>,
        action: &'static str,
        object: &str,
        detail: serde_json::Value,
    ) -> Result<(), Error> {
        let (tenant, actor, request_id) = (tenant.into(), &self.actor.id, self.request_id);
        audit::record(conn, audit::AuditEvent { tenant, actor, action, object, request_id, detail }).await
    }
}

/// A tenant as an extractor has loaded it.
#[derive(Debug, Clone)]
pub struct TenantRef {
    /// Identity.
    pub id: TenantId,
    /// Name.
    pub name: TenantName,
    /// `active`, `suspended`, `offboarding` or `offboarded`.
    pub state: String,
}

impl TenantRef {
    /// Rejects a change while the tenant is not active.
    pub fn require_active(&self) -> Result<(), Error> {
        match self.state.as_str() {
            "active" => Ok(()),
            state => {
                Err(Error::Conflict(format!("the tenant is {state}; only an active tenant can be changed")))
            }
        }
    }
}

/// Whether a permission reads or changes. Members of a suspended tenant can only read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Reads.
    Reads,
    /// Changes.
    Changes,
}

/// The requirements of a route: one row of the permission table.
pub trait Permission: 'static {
    /// Minimum role within the tenant. `None` if no tenant role suffices.
    const TENANT: Option<Role>;
    /// Minimum platform role.
    const PLATFORM: PlatformRole;
    /// Whether it reads or changes.
    const EFFECT: Effect;
}

/// A row of the permission table, for documentation and tests.
#[derive(Debug, Clone, Copy)]
pub struct PermissionRow {
    /// Name.
    pub name: &'static str,
    /// Description of the permission.
    pub words: &'static str,
    /// Minimum role within the tenant.
    pub tenant: Option<Role>,
    /// Minimum platform role.
    pub platform: PlatformRole,
    /// Whether it reads or changes.
    pub effect: Effect,
}

macro_rules! permissions {
    ($($name:ident: $words:literal, $tenant:expr, $platform:ident, $effect:ident;)*) => {
        $(
            #[doc = $words]
            #[derive(Debug, Clone, Copy)]
            pub struct $name;
            impl Permission for $name {
                const TENANT: Option<Role> = $tenant;
                const PLATFORM: PlatformRole = PlatformRole::$platform;
                const EFFECT: Effect = Effect::$effect;
            }
        )*
        /// The permission table.
        pub const PERMISSIONS: &[PermissionRow] = &[$(PermissionRow {
            name: stringify!($name), words: $words, tenant: $tenant, platform: PlatformRole::$platform,
            effect: Effect::$effect,
        }),*];
    };
}

permissions! {
    ReadTenant: "See a tenant, its apps, images, logs and members", Some(Role::Viewer), Auditor, Reads;
    PullImages: "Pull the tenant's images", Some(Role::Viewer), Admin, Reads;
    PushImages: "Push images", Some(Role::Deployer), Admin, Changes;
    Deploy: "Deploy, roll back and delete apps; delete images", Some(Role::Deployer), Admin, Changes;
    ReadActivity: "Read a tenant's audit log", Some(Role::Owner), Auditor, Reads;
    ManageCredentials: "Create and revoke registry credentials, service accounts and their tokens", Some(Role::Owner), Admin, Changes;
    ManageMembers: "Invite users, change their role, remove them", Some(Role::Owner), Admin, Changes;
    ManageConnections: "Offer, accept and revoke grants; request egress targets", Some(Role::Owner), Admin, Changes;
    ReadPlatform: "See the platform: all tenants, pools, accounts, the audit log", None, Auditor, Reads;
    ManageTenants: "Onboard, change, suspend and offboard tenants", None, Admin, Changes;
    ManageNetwork: "Manage the catalogue of services; decide on service access and egress targets", None, Admin, Changes;
    ManagePeople: "Invite users to the platform, change their role, disable them, create password reset links", None, Admin, Changes;
}

/// Whether these roles include the permission `P`.
#[must_use]
pub fn includes<P: Permission>(platform: Option<PlatformRole>, role: Option<Role>) -> bool {
    platform.is_some_and(|role| role >= P::PLATFORM)
        || P::TENANT.is_some_and(|least| role.is_some_and(|role| role >= least))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_include_those_before() {
        assert!(includes::<Deploy>(None, Some(Role::Owner)));
        assert!(!includes::<Deploy>(None, Some(Role::Viewer)));
        assert!(!includes::<Deploy>(Some(PlatformRole::Auditor), None));
        assert!(includes::<Deploy>(Some(PlatformRole::Admin), None));
        assert!(!includes::<ManageTenants>(None, Some(Role::Owner)));
        assert!(!includes::<ReadTenant>(None, None));
        assert!(PERMISSIONS.iter().all(|row| !row.words.is_empty()));
    }
}
