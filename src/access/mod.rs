//! Who may do what. One table of permissions; the extractors in `extract.rs` are the only way to
//! an [`Actor`], and every route takes one of them.

use crate::ids::{ActorId, TenantId, TenantName};

pub mod console;
pub mod credentials;
pub mod extract;
pub mod idempotency;
mod store;

pub use extract::{PlatformScope, Public, TenantScope};
pub use store::{create_first_admin_link, create_token, has_admin, prune, still_opens};

/// What somebody may do within one tenant. Each includes the ones before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Sees everything of the tenant.
    Viewer,
    /// Deploys, rolls back and deletes apps and images.
    Deployer,
    /// Also makes credentials.
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

impl Role {
    /// The role of this name.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "viewer" => Some(Self::Viewer),
            "deployer" => Some(Self::Deployer),
            "owner" => Some(Self::Owner),
            _ => None,
        }
    }
    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Deployer => "deployer",
            Self::Owner => "owner",
        }
    }
}

impl PlatformRole {
    /// The role of this name.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "auditor" => Some(Self::Auditor),
            "admin" => Some(Self::Admin),
            _ => None,
        }
    }
    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auditor => "auditor",
            Self::Admin => "admin",
        }
    }
}

/// Where somebody's authority holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authority {
    /// On the platform.
    Platform(PlatformRole),
    /// In one tenant only.
    Tenant(TenantId, Role),
}

/// Somebody who was authenticated.
#[derive(Debug, Clone)]
pub struct Actor {
    /// As it stands in the audit.
    pub id: ActorId,
    /// The credential's own name.
    pub name: String,
    /// The API token behind it.
    pub token_id: i64,
    /// What it may do where.
    pub authority: Authority,
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
    pub fn require_active(&self) -> Result<(), crate::error::Error> {
        match self.state.as_str() {
            "active" => Ok(()),
            state => Err(crate::error::Error::Conflict(format!(
                "the tenant is {state}; only an active one can change"
            ))),
        }
    }
}

/// What a route needs. One row of the table of permissions.
pub trait Permission: 'static {
    /// The smallest role within the tenant; none if no role of a tenant suffices.
    const TENANT: Option<Role>;
    /// The smallest role on the platform.
    const PLATFORM: PlatformRole;
}

macro_rules! permissions {
    ($($(#[$doc:meta])* $name:ident: $tenant:expr, $platform:ident;)*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy)]
            pub struct $name;
            impl Permission for $name {
                const TENANT: Option<Role> = $tenant;
                const PLATFORM: PlatformRole = PlatformRole::$platform;
            }
        )*
    };
}

permissions! {
    /// See a tenant and what is in it.
    ReadTenant: Some(Role::Viewer), Auditor;
    /// Deploy, roll back, delete apps; delete images.
    Deploy: Some(Role::Deployer), Admin;
    /// Make and revoke registry credentials.
    ManageCredentials: Some(Role::Owner), Admin;
    /// See the platform: list of tenants, pools.
    ReadPlatform: None, Auditor;
    /// Onboard, change, suspend, offboard tenants.
    ManageTenants: None, Admin;
}

impl Actor {
    /// Whether this actor may do what `P` stands for in this tenant.
    #[must_use]
    pub fn may_in<P: Permission>(&self, tenant: TenantId) -> bool {
        match self.authority {
            Authority::Platform(role) => role >= P::PLATFORM,
            Authority::Tenant(own, role) => own == tenant && P::TENANT.is_some_and(|least| role >= least),
        }
    }

    /// Whether this actor may know that the tenant exists.
    #[must_use]
    pub fn knows(&self, tenant: TenantId) -> bool {
        match self.authority {
            Authority::Platform(_) => true,
            Authority::Tenant(own, _) => own == tenant,
        }
    }
}
