//! The config of an image: its command, user and platform.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::manifest::ManifestError;
use super::strict::strict;

/// Maximum size of a config, in bytes.
pub const LIMIT: usize = 1 << 20;

/// The relevant fields of a config.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// Operating system.
    pub os: String,
    /// Architecture.
    pub architecture: String,
    /// `USER`.
    pub user: String,
    /// `ENTRYPOINT`.
    pub entrypoint: Vec<String>,
    /// `CMD`.
    pub cmd: Vec<String>,
    /// TCP ports of `EXPOSE`.
    pub exposed_ports: Vec<u16>,
    /// `VOLUME`.
    pub volumes: Vec<String>,
    /// `ENV`.
    pub env: Vec<String>,
    /// `WORKDIR`.
    pub working_dir: String,
    /// `STOPSIGNAL`.
    pub stop_signal: String,
    /// Whether the image has a `HEALTHCHECK`.
    pub healthcheck: bool,
    /// Digests of the unpacked layers, from the bottom up.
    pub diff_ids: Vec<String>,
}

#[derive(Deserialize)]
struct RawImageConfig {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    config: Option<RawConfig>,
    #[serde(default)]
    rootfs: RawLayers,
}

#[derive(Default, Deserialize)]
struct RawLayers {
    #[serde(default)]
    diff_ids: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RawConfig {
    user: Option<String>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    exposed_ports: Option<BTreeMap<String, serde_json::Value>>,
    volumes: Option<BTreeMap<String, serde_json::Value>>,
    labels: Option<BTreeMap<String, String>>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    healthcheck: Option<serde_json::Value>,
}

/// Maximum bytes of an image's labels, and of its environment. The engine copies both to each container.
const BROUGHT: usize = 64 << 10;
/// Maximum words of a command, and maximum number of ports and volumes together.
const LISTED: usize = 512;

impl ImageConfig {
    /// Returns the approximate bytes in memory: each text with its header and the allocator's overhead.
    #[must_use]
    pub fn kept(&self) -> usize {
        let lists = [&self.entrypoint, &self.cmd, &self.volumes, &self.env, &self.diff_ids];
        let listed: usize = lists.into_iter().flatten().map(|text| text.len() + 48).sum();
        let own = [&self.os, &self.architecture, &self.user, &self.working_dir, &self.stop_signal];
        own.into_iter().map(|text| text.len() + 48).sum::<usize>() + listed + self.exposed_ports.len() * 2
    }

    /// Parses a config.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let value = strict(bytes)?;
        let raw: RawImageConfig = serde_json::from_value(value)
            .map_err(|_| ManifestError("the config of the image has a field of the wrong type".into()))?;
        let config = raw.config.unwrap_or_default();
        let labels: usize = config.labels.iter().flatten().map(|(key, value)| key.len() + value.len()).sum();
        let env: usize = config.env.iter().flatten().map(String::len).sum();
        if labels > BROUGHT || env > BROUGHT {
            return Err(ManifestError(
                "the labels or the environment of the image are larger than 64 KiB".into(),
            ));
        }
        let lists = [&config.entrypoint, &config.cmd].into_iter().flatten();
        let (words, letters) = lists.flatten().fold((0, 0), |(n, sum), word| (n + 1, sum + word.len()));
        let many =
            [&config.exposed_ports, &config.volumes].into_iter().flatten().map(BTreeMap::len).sum::<usize>();
        if words > LISTED || letters > BROUGHT || many > LISTED {
            return Err(ManifestError(
                "the command, the ports or the volumes of the image are more than 512 or longer than 64 KiB"
                    .into(),
            ));
        }
        let port = |text: &String| text.strip_suffix("/tcp").unwrap_or(text).parse().ok();
        Ok(Self {
            os: raw.os,
            architecture: raw.architecture,
            user: config.user.unwrap_or_default().trim().to_owned(),
            entrypoint: config.entrypoint.unwrap_or_default(),
            cmd: config.cmd.unwrap_or_default(),
            exposed_ports: config.exposed_ports.unwrap_or_default().keys().filter_map(port).collect(),
            volumes: config.volumes.unwrap_or_default().into_keys().collect(),
            env: config.env.unwrap_or_default(),
            working_dir: config.working_dir.unwrap_or_default(),
            stop_signal: config.stop_signal.unwrap_or_default(),
            healthcheck: config.healthcheck.is_some_and(|check| {
                let first = check["Test"][0].as_str();
                first.is_some_and(|word| !word.is_empty() && word != "NONE")
            }),
            diff_ids: raw.rootfs.diff_ids,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_is_read_and_its_lies_are_not() {
        let text = br#"{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]},
            "config":{"User":"app","Cmd":["a"],"Entrypoint":null,"ExposedPorts":{"8080/tcp":{},"53/udp":{}},"Volumes":{"/data":{}}}}"#;
        let config = ImageConfig::parse(text).unwrap();
        assert_eq!((config.user.as_str(), config.exposed_ports.as_slice()), ("app", [8080].as_slice()));
        assert_eq!(config.volumes, ["/data"]);
        let check = |test: &str| {
            let text = format!(r#"{{"config":{{"Healthcheck":{test}}}}}"#);
            ImageConfig::parse(text.as_bytes()).unwrap().healthcheck
        };
        assert!(check(r#"{"Test":["CMD","true"],"Interval":1}"#) && check(r#"{"Test":["CMD-SHELL","x"]}"#));
        assert!(!check(r#"{"Test":["NONE"]}"#) && !check(r#"{"Test":[]}"#) && !check("null"));
        // An empty text takes three bytes in a config, but more in memory.
        let env = ImageConfig { env: vec![String::new(); 1_000], ..ImageConfig::default() };
        assert!(env.kept() > 24_000 && config.kept() < 1_000, "{} {}", env.kept(), config.kept());
        assert!(ImageConfig::parse(br#"{"os":"linux","OS":"windows"}"#).is_err());
        assert!(ImageConfig::parse(br#"{"config":{"User":5}}"#).is_err());
        let volumes: serde_json::Map<String, serde_json::Value> =
            (0..600).map(|n| (n.to_string(), serde_json::json!({}))).collect();
        let long = serde_json::json!({"config": {"Volumes": volumes}}).to_string();
        assert!(ImageConfig::parse(long.as_bytes()).unwrap_err().0.contains("512"));
        let large = serde_json::json!({"config": {"Labels": {"a": "x".repeat(70_000)}}}).to_string();
        assert!(ImageConfig::parse(large.as_bytes()).unwrap_err().0.contains("64 KiB"));
    }
}
