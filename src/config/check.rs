//! Rules between settings. All violations are reported together, one sentence each.

use std::net::IpAddr;

use super::Config;

impl Config {
    /// Checks the rules between settings.
    pub(super) fn check(&self, faults: &mut Vec<String>) {
        let server = &self.server;
        if server.tls_certificate.is_some() != server.tls_key.is_some() {
            faults.push("server.tls_certificate and server.tls_key need each other: set both or none".into());
        }
        if !server.listen.ip().is_loopback() && server.tls_certificate.is_none() && !server.behind_proxy {
            faults.push(format!(
                "server.listen {} is not loopback and would be plain text: set server.tls_certificate and \
                 server.tls_key, or server.behind_proxy = true if a proxy in front terminates TLS",
                server.listen
            ));
        }
        if !server.pull_listen.ip().is_loopback() {
            faults.push(
                "server.pull_listen must be a loopback address: only the engine on this machine uses it"
                    .into(),
            );
        }
        if server.pull_listen == server.listen || server.metrics_listen == Some(server.listen) {
            faults.push(
                "server.listen, server.pull_listen and server.metrics_listen must be different addresses"
                    .into(),
            );
        }
        let url = &self.registry.url;
        if !["http://", "https://", "unix:///"].iter().any(|form| url.starts_with(form)) {
            faults.push("registry.url must start with http://, https:// or unix:///".into());
        }
        if let Some(url) = &server.external_url {
            check_external_url(url, faults);
        } else if !server.listen.ip().is_loopback() {
            faults.push(
                "server.external_url is required unless server.listen is loopback: links and the registry's realm contain it"
                    .into(),
            );
        }
        if server.workers == 0 || server.workers > 64 {
            faults.push("server.workers must be 1 to 64".into());
        }
        if server.connections.is_some_and(|most| !(64..=1_000_000).contains(&most)) {
            faults.push("server.connections must be 64 to 1000000".into());
        }
        if !(8..=1_000_000).contains(&server.connections_per_source) {
            faults.push("server.connections_per_source must be 8 to 1000000".into());
        }
        if !server.trusted_proxies.is_empty() && !server.behind_proxy {
            faults.push("server.trusted_proxies requires server.behind_proxy = true".into());
        }
        if self.database.connections < 4 {
            faults.push("database.connections must be at least 4".into());
        }
        let logins = [&self.database.user, &self.database.reconciler_user, &self.database.admin_user];
        if logins[0] == logins[1]
            || logins[..2].contains(&logins[2])
            || logins.contains(&&"bulkhead_owner".to_owned())
        {
            faults.push(
                "database.user, database.reconciler_user and database.admin_user must be three roles, none of them \
                 bulkhead_owner"
                    .into(),
            );
        }
        self.check_providers(faults);
        self.check_pools(faults);
        self.limits.check(faults);
    }

    fn check_providers(&self, faults: &mut Vec<String>) {
        if self.access.audit_months < 3 {
            faults.push("access.audit_months must be at least 3".into());
        }
        let mut seen = Vec::new();
        for provider in &self.access.providers {
            let at = |field: &str| format!("access.providers: {}: {field}", provider.name);
            let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            if !(1..=32).contains(&provider.name.len())
                || !provider.name.bytes().all(plain)
                || matches!(provider.name.as_str(), "local" | "second-factor")
            {
                faults.push(at(
                    "name must have 1 to 32 of a to z, 0 to 9 and -, and is not local or second-factor",
                ));
            }
            let own = (provider.name.as_str(), provider.issuer.as_str());
            if seen.iter().any(|(name, issuer)| *name == own.0 || *issuer == own.1) {
                faults.push(at("each provider needs a name and an issuer of its own"));
            }
            seen.push(own);
            let plain_loopback = provider
                .issuer
                .strip_prefix("http://")
                .is_some_and(|rest| is_loopback(rest.split('/').next().unwrap_or_default()));
            if !provider.issuer.starts_with("https://") && !plain_loopback {
                faults.push(at("issuer must start with https:// unless it is a loopback address"));
            }
            for mapping in &provider.roles {
                let known: &[&str] = match mapping.tenant {
                    Some(_) => &["viewer", "deployer", "owner"],
                    None => &["auditor", "admin"],
                };
                if !known.contains(&mapping.role.as_str()) {
                    faults.push(at(&format!("roles: {} must be one of {}", mapping.value, known.join(", "))));
                }
            }
        }
    }

    fn check_pools(&self, faults: &mut Vec<String>) {
        let pools = &self.pools;
        if pools.uid_start < 65_536 || pools.uid_end > 2_147_483_647 || pools.uid_end <= pools.uid_start {
            faults.push(
                "pools.uid_start to pools.uid_end must lie between 65536 and 2147483647, which is the highest id that \
                 container runtimes accept"
                    .into(),
            );
        } else if pools.range_size == 0 || pools.uid_end - pools.uid_start < pools.range_size {
            faults.push("pools.uid_start to pools.uid_end must hold at least one pools.range_size".into());
        }
        if pools.block_size < 16 || !pools.range_size.is_multiple_of(pools.block_size.max(1)) {
            faults.push("pools.block_size must be at least 16, and divides pools.range_size".into());
        }
        if pools.subnet_prefix < pools.network.prefix() || pools.subnet_prefix > 28 {
            faults.push("pools.subnet_prefix must lie between the prefix of pools.network and 28".into());
        }
    }
}

fn check_external_url(text: &str, faults: &mut Vec<String>) {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    match rest {
        None => faults.push("server.external_url must start with https:// or http://".into()),
        Some(host) if host.is_empty() || host.contains(['/', '@', '?', '#', ' ']) => {
            faults.push(
                "server.external_url must be a scheme, a host and an optional port, without a path".into(),
            );
        }
        Some(host) if text.starts_with("http://") && !is_loopback(host) => {
            faults.push("server.external_url must be https:// unless it is a loopback address".into());
        }
        Some(_) => {}
    }
}

/// Returns whether the host part of an address (`host` or `host:port`) is loopback.
#[must_use]
pub fn is_loopback(authority: &str) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => authority,
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}
