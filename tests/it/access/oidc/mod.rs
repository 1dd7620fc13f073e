//! Sign-in through providers: a certified one, and a hostile one of our own.

mod certified;
mod hostile;
mod liar;

use bulkhead::config::{ProviderSettings, RoleMapping};

/// Returns settings of a provider, with a mapping of groups to roles.
fn settings(name: &str, issuer: &str, secret: &std::path::Path) -> ProviderSettings {
    let map = |value: &str, tenant: Option<&str>, role: &str| RoleMapping {
        value: value.into(),
        tenant: tenant.map(|name| name.parse().unwrap()),
        role: role.into(),
    };
    std::fs::write(secret, "the-secret-of-the-client\n").unwrap();
    ProviderSettings {
        name: name.into(),
        label: format!("The {name} provider"),
        issuer: issuer.into(),
        client_id: "bulkhead".into(),
        client_secret: Some(secret.to_owned()),
        scopes: ["profile", "email", "groups"].map(String::from).into(),
        hosts: Vec::new(),
        ca: None,
        roles_claim: "groups".into(),
        roles: vec![
            map("ops", None, "admin"),
            map("acme-dev", Some("acme"), "deployer"),
            map("acme-own", Some("acme"), "owner"),
            map("beta-see", Some("beta"), "viewer"),
        ],
        admit_all: false,
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
