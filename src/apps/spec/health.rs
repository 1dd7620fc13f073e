//! The fields `port` and `health`: the port that an app serves on, and its health check.

use super::read::{SpecWalk, get};
use super::tree::{At, SpecNode, Value};
use super::{HealthField, fields};
use crate::driver::workload::{Health, HealthCheck, Serves};
use crate::fault::catalogue as code;
use crate::fault::{Fault, Kind};
use crate::policy::Protocol;

impl SpecWalk<'_, '_> {
    /// Reads `port`: a TCP port number, or a group with the port and its protocol.
    pub(super) fn serves(&mut self, node: &SpecNode<'_>) -> Option<Serves> {
        if !matches!(node.value, Value::Map(_)) {
            return self.port(node, "port").map(Serves::tcp);
        }
        let entries = self.group(node, "port", fields::PORT)?;
        let port = if let Some(node) = get(entries, "port") {
            self.port(node, "port.port")
        } else {
            let fault = Fault::new(code::MISSING, Kind::Missing, "port.port", "port is required");
            self.add(node.at, fault.instead("such as port: {port: 5514, protocol: udp}"));
            None
        };
        let protocol = match get(entries, "protocol") {
            None => Some(Protocol::Tcp),
            Some(node) => {
                let text = self.text(node, || "port.protocol".into());
                let protocol = text.and_then(Protocol::parse);
                if text.is_some() && protocol.is_none() {
                    self.bad(node.at, code::PORT, "port.protocol", "is tcp or udp", "");
                }
                protocol
            }
        };
        Some(Serves { port: port?, protocol: protocol? })
    }

    /// Reads `health`; none when it has faults.
    pub(super) fn health(
        &mut self,
        node: Option<&SpecNode<'_>>,
        port: Option<Serves>,
        is_bad: bool,
    ) -> Option<HealthField> {
        let Some(node) = node else { return Some(HealthField::Nothing) };
        if matches!(&node.value, Value::Text(text) if text == "none") {
            return Some(HealthField::None);
        }
        let entries = self.group(node, "health", fields::HEALTH)?;
        let grace = get(entries, "grace").map_or(Some(u32::from(fields::GRACE_DEFAULT)), |node| {
            self.whole(node, "health.grace", code::HEALTH, (0, fields::GRACE.into()))
        });
        let check = match (get(entries, "http"), get(entries, "tcp")) {
            (Some(http), None) => {
                let inner = self.group(http, "health.http", fields::HTTP)?;
                let own = get(inner, "port").map(|node| self.port(node, "health.http.port"));
                let path = if let Some(node) = get(inner, "path") {
                    self.health_path(node)
                } else {
                    let fault =
                        Fault::new(code::MISSING, Kind::Missing, "health.http.path", "path is required");
                    self.add(http.at, fault.instead("such as path: /healthz"));
                    None
                };
                let port = self.check_port(own, port, is_bad, http.at);
                path.zip(port).map(|(path, port)| HealthCheck::Http { path, port })
            }
            (None, Some(tcp)) => {
                let inner = self.group(tcp, "health.tcp", fields::TCP)?;
                let own = get(inner, "port").map(|node| self.port(node, "health.tcp.port"));
                self.check_port(own, port, is_bad, tcp.at).map(|port| HealthCheck::Tcp { port })
            }
            _ => {
                self.bad(node.at, code::HEALTH, "health", "has exactly one of http and tcp", "");
                None
            }
        };
        let grace = u16::try_from(grace?).ok()?;
        Some(HealthField::Check(Health::new(check?, grace)))
    }

    fn check_port(
        &mut self,
        own: Option<Option<u16>>,
        app: Option<Serves>,
        app_is_bad: bool,
        at: At,
    ) -> Option<u16> {
        match (own, app) {
            (Some(own), _) => own,
            (None, Some(Serves { protocol: Protocol::Tcp, port })) => Some(port),
            (None, Some(_)) => {
                let message = "a health check uses TCP, but the app's port is UDP";
                self.bad(
                    at,
                    code::HEALTH,
                    "health",
                    message,
                    "give the check a TCP port of its own, or leave health out",
                );
                None
            }
            (None, None) => {
                if !app_is_bad {
                    self.bad(
                        at,
                        code::HEALTH,
                        "health",
                        "the health check has no port",
                        "give the app a port, or give the check its own port",
                    );
                }
                None
            }
        }
    }

    fn health_path(&mut self, node: &SpecNode<'_>) -> Option<String> {
        let path = self.text(node, || "health.http.path".into())?;
        let good =
            path.starts_with('/') && path.len() <= 256 && path.bytes().all(|b| (0x21..0x7f).contains(&b));
        if !good {
            let message = "is an absolute path of at most 256 visible ASCII characters";
            self.bad(node.at, code::HEALTH, "health.http.path", message, "such as /healthz");
        }
        good.then(|| path.to_owned())
    }
}
