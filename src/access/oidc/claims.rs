//! Mapping of a provider's claims to name and roles. Pure.

use serde_json::Value;

use super::Extra;
use crate::access::{PlatformRole, Role};
use crate::config::ProviderSettings;
use crate::fault::plain;
use crate::ids::TenantName;

/// Roles that the claims grant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClaimedRoles {
    /// Platform role.
    pub platform: Option<PlatformRole>,
    /// Tenant roles, ordered by tenant name. If several values match a tenant, the highest role counts.
    pub tenants: Vec<(TenantName, Role)>,
}

impl ClaimedRoles {
    /// Whether the claims grant no role.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.platform.is_none() && self.tenants.is_empty()
    }
}

fn values<'a>(settings: &ProviderSettings, claims: &'a Extra) -> Vec<&'a str> {
    match claims.get(&settings.roles_claim) {
        Some(Value::String(one)) => vec![one.as_str()],
        Some(Value::Array(many)) => many.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

/// Maps the roles claim through the settings. Only exact matches count.
pub(super) fn roles(settings: &ProviderSettings, claims: &Extra) -> ClaimedRoles {
    let values = values(settings, claims);
    let mut given = ClaimedRoles::default();
    for mapping in settings.roles.iter().filter(|mapping| values.contains(&mapping.value.as_str())) {
        match &mapping.tenant {
            None => given.platform = given.platform.max(PlatformRole::parse(&mapping.role)),
            Some(tenant) => {
                let Some(role) = Role::parse(&mapping.role) else { continue };
                match given.tenants.iter_mut().find(|(known, _)| known == tenant) {
                    Some((_, known)) => *known = role.max(*known),
                    None => given.tenants.push((tenant.clone(), role)),
                }
            }
        }
    }
    given.tenants.sort();
    given
}

/// Derives an account name from the provider's name for the user. The name is a label; it does not identify the
/// user.
#[must_use]
pub fn name(preferred: &[Option<&str>], provider: &str) -> String {
    let made = preferred.iter().flatten().map(|text| {
        let lower: String = text
            .to_lowercase()
            .chars()
            .map(
                |c| if c.is_ascii_lowercase() || c.is_ascii_digit() || "._@+-".contains(c) { c } else { '-' },
            )
            .take(50)
            .collect();
        lower.trim_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()
    });
    made.into_iter().find(|name| !name.is_empty()).unwrap_or_else(|| format!("{provider}-user"))
}

/// Returns a display name without control, invisible and bidirectional characters.
#[must_use]
pub fn display_name(text: Option<&str>, otherwise: &str) -> String {
    let clean: String = text.unwrap_or_default().chars().filter(|c| plain(*c) == *c).take(120).collect();
    if clean.trim().is_empty() { otherwise.to_owned() } else { clean.trim().to_owned() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::RoleMapping;

    fn settings() -> ProviderSettings {
        let map = |value: &str, tenant: Option<&str>, role: &str| RoleMapping {
            value: value.into(),
            tenant: tenant.map(|name| name.parse().unwrap()),
            role: role.into(),
        };
        ProviderSettings {
            name: "id".into(),
            label: "Id".into(),
            issuer: "https://id.example".into(),
            client_id: "x".into(),
            client_secret: None,
            scopes: Vec::new(),
            hosts: Vec::new(),
            ca: None,
            roles_claim: "groups".into(),
            roles: vec![
                map("ops", None, "admin"),
                map("read", None, "auditor"),
                map("acme-dev", Some("acme"), "deployer"),
                map("acme-all", Some("acme"), "owner"),
                map("beta", Some("beta"), "viewer"),
            ],
            admit_all: false,
        }
    }

    fn given(claim: Value) -> ClaimedRoles {
        roles(&settings(), &Extra::from([("groups".to_owned(), claim)]))
    }

    #[test]
    fn only_what_is_mapped_is_given() {
        assert_eq!(given(json!(["ops", "read"])).platform, Some(PlatformRole::Admin));
        assert_eq!(given(json!("read")).platform, Some(PlatformRole::Auditor));
        let both = given(json!(["acme-dev", "acme-all", "beta", "gamma"]));
        let names: Vec<_> = both.tenants.iter().map(|(name, role)| (name.as_str(), *role)).collect();
        assert_eq!(names, [("acme", Role::Owner), ("beta", Role::Viewer)]);
        for odd in [
            json!(null),
            json!(7),
            json!({"ops": true}),
            json!(["OPS", "ops ", " ops", ["ops"]]),
            json!("ops,read"),
        ] {
            assert!(given(odd.clone()).is_nothing(), "{odd}");
        }
        assert!(roles(&settings(), &Extra::new()).is_nothing());
    }

    #[test]
    fn names_are_names() {
        assert_eq!(name(&[Some("Alice Doe"), None], "id"), "alice-doe");
        assert_eq!(name(&[None, Some("Alice@Example.org")], "id"), "alice@example.org");
        assert_eq!(name(&[Some("///"), Some("")], "id"), "id-user");
        assert!(name(&[Some(&"x".repeat(300))], "id").len() <= 50);
        assert_eq!(display_name(Some("A\u{202e}B\u{7}"), "x"), "AB");
        assert_eq!(display_name(Some("  "), "x"), "x");
    }
}
