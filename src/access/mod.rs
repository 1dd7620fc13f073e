//! Who may do what. One table of permissions, from which the extractors in `extract.rs`, the console and the
//! documentation derive; those extractors are the only way to an [`Actor`], and every route takes one.

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

/// What somebody may do within one tenant. Each includes the ones before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Sees everything of the tenant.
    Viewer,
    /// Deploys, rolls back and deletes apps and images.
    Deployer,
    /// Also decides about people and credentials.
    Owner,
}

/// What somebody may do on the platform. Each includes the ones before.
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
            /// Names of all roles, the smallest first.
            pub const NAMES: &[&str] = &[$($name),*];

            /// The role of this name.
            #[must_use]
            pub fn parse(text: &str) -> Option<Self> {
                match text {
                    $($name => Some(Self::$variant),)*
                    _ => None,
                }
            }
            /// Its name.
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

/// Where somebody's authority holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authority {
    /// On the platform.
    Platform(PlatformRole),
    /// In one tenant only.
    Tenant(TenantId, Role),
}

/// By what somebody was recognised. It can be asked again: streams outlast the request that began them.
#[derive(Debug, Clone)]
pub enum Means {
    /// A session of a person.
    Session {
        /// Number.
        id: i64,
        /// Hash of its reference.
        hash: Vec<u8>,
        /// Whether the person has proved to be there within the last ten minutes.
        recent: bool,
    },
    /// An API token.
    Token {
        /// Number.
        id: i64,
        /// Hash.
        hash: Vec<u8>,
        /// Its end.
        expires_at: OffsetDateTime,
    },
}

/// Somebody who was authenticated.
#[derive(Debug, Clone)]
pub struct Actor {
    /// As it stands in the audit.
    pub id: ActorId,
    /// Name, for people.
    pub name: String,
    /// The person; none for service accounts and tokens that root has made.
    pub account: Option<AccountId>,
    /// By what.
    pub means: Means,
    /// Role on the platform, as it is now.
    pub platform: Option<PlatformRole>,
}

impl Actor {
    /// Who pays for its requests.
    #[must_use]
    pub fn payer(&self) -> turns::Payer {
        match (&self.means, self.account) {
            (Means::Token { id, .. }, _) => turns::Payer::Token(*id),
            (Means::Session { .. }, Some(account)) => turns::Payer::Account(account.0),
            (Means::Session { id, .. }, None) => turns::Payer::Account(-*id),
        }
    }

    /// For what matters most: a session must have been confirmed within ten minutes. A token has no
    /// person behind it that could be asked; what it may do is bounded by its scope.
    pub fn require_recent(&self) -> Result<(), Error> {
        match self.means {
            Means::Session { recent: false, .. } => Err(Error::Unconfirmed),
            _ => Ok(()),
        }
    }

    /// The person, where only a person in a session will do.
    pub fn require_person(&self) -> Result<AccountId, Error> {
        self.require_session().map(|(account, _)| account)
    }

    /// The same, with the number of the session.
    pub fn require_session(&self) -> Result<(AccountId, i64), Error> {
        match (&self.means, self.account) {
            (Means::Session { id, .. }, Some(account)) => Ok((account, *id)),
            _ => Err(Error::Forbidden("this is for a person who has signed in, not for a token".into())),
        }
    }

    /// The end of the token by which somebody came: what a token makes does not outlive it.
    #[must_use]
    pub fn ends(&self) -> Option<OffsetDateTime> {
        match self.means {
            Means::Token { expires_at, .. } => Some(expires_at),
            Means::Session { .. } => None,
        }
    }
}

/// Who acts, within which request.
#[derive(Debug, Clone, Copy)]
pub struct By<'a> {
    /// Who.
    pub actor: &'a Actor,
    /// Request.
    pub request_id: &'a str,
}

impl By<'_> {
    /// Puts a change on a tenant's record, or (none) the platform's: within the transaction that makes it.
    pub async fn record(
        self,
        conn: &mut PgConnection,
        tenant: impl Into<Option<TenantId>>,
        action: &'static str,
        object: &str,
        detail: serde_json::Value,
    ) -> Result<(), Error> {
        let (tenant, actor, request_id) = (tenant.into(), &self.actor.id, self.request_id);
        audit::record(conn, audit::Event { tenant, actor, action, object, request_id, detail }).await
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
    /// Refuses a change while the tenant is not active.
    pub fn require_active(&self) -> Result<(), Error> {
        match self.state.as_str() {
            "active" => Ok(()),
            state => Err(Error::Conflict(format!("the tenant is {state}; only an active one can change"))),
        }
    }
}

/// Whether a permission only looks, or changes something: a suspended tenant's own people only look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Looks.
    Reads,
    /// Changes.
    Changes,
}

/// What a route needs. One row of the table of permissions.
pub trait Permission: 'static {
    /// The smallest role within the tenant; none if no role of a tenant suffices.
    const TENANT: Option<Role>;
    /// The smallest role on the platform.
    const PLATFORM: PlatformRole;
    /// What it does.
    const EFFECT: Effect;
}

/// A row of the table, for documentation and tests.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Name.
    pub name: &'static str,
    /// What it allows, in words.
    pub words: &'static str,
    /// The smallest role within the tenant.
    pub tenant: Option<Role>,
    /// The smallest role on the platform.
    pub platform: PlatformRole,
    /// What it does.
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
        /// The table.
        pub const PERMISSIONS: &[Row] = &[$(Row {
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
    ReadActivity: "See who did what in a tenant", Some(Role::Owner), Auditor, Reads;
    ManageCredentials: "Make and revoke robots, service accounts and their tokens", Some(Role::Owner), Admin, Changes;
    ManageMembers: "Invite people, change their role, remove them", Some(Role::Owner), Admin, Changes;
    ManageConnections: "Offer, accept and end grants; ask for places outside", Some(Role::Owner), Admin, Changes;
    ReadPlatform: "See the platform: all tenants, pools, people, its own activity", None, Auditor, Reads;
    ManageTenants: "Onboard, change, suspend and offboard tenants", None, Admin, Changes;
    ManageNetwork: "Keep the catalogue of services, decide who may use them and which places outside are open", None, Admin, Changes;
    ManagePeople: "Invite people to the platform, change their role, disable them, make links for new passwords", None, Admin, Changes;
}

/// Whether these roles include `P`.
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
