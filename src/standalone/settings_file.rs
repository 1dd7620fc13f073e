//! `settings.toml` of a data folder: the operator's settings, which override the folder's own. It holds only
//! the differences. A database or registry that it names replaces the private one.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::{DataFolder, Failed};
use crate::config::Config;

/// The default address of a service.
pub(super) const LISTEN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8080);

/// The operator's settings.
#[derive(Debug, Default)]
pub(super) struct Overlay(toml::Table);

/// Returns the path of the file.
pub(super) fn place(data: &Path) -> PathBuf {
    data.join("settings.toml")
}

impl Overlay {
    /// Reads the file; without one, nothing is overridden.
    pub(super) fn load(data: &Path) -> Result<Self, Failed> {
        let path = place(data);
        match std::fs::read_to_string(&path) {
            Ok(text) => text
                .parse()
                .map(Self)
                .map_err(|error| Failed::doing(format!("{} cannot be read", path.display()), error)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(Failed::doing(path.display(), error)),
        }
    }

    fn names(&self, section: &str, key: &str) -> bool {
        self.0.get(section).and_then(|section| section.get(key)).is_some()
    }

    /// Returns whether the operator provides the database.
    pub(super) fn database(&self) -> bool {
        self.names("database", "host")
    }

    /// Returns whether the operator provides the registry.
    pub(super) fn registry(&self) -> bool {
        self.names("registry", "url")
    }

    /// Returns the settings of `serve`, with the overrides applied: as text, and parsed.
    pub(super) fn over(&self, folder: &DataFolder) -> Result<(String, Config), Failed> {
        let mut base = folder.config(LISTEN);
        if self.registry() {
            (base.registry.collector, base.registry.disk) = (None, None);
        }
        let failed = |error: toml::ser::Error| Failed(error.to_string());
        let mut table = toml::Table::try_from(&base).map_err(failed)?;
        lay_over(&mut table, &self.0);
        let text = toml::to_string(&table).map_err(failed)?;
        let config = Config::parse(&text, &[]).map_err(|error| {
            Failed::doing(format!("{} is not valid", place(&folder.path).display()), error)
        })?;
        for (name, fixed) in [
            ("installation", config.installation == base.installation),
            ("server.pull_listen", config.server.pull_listen == base.server.pull_listen),
            ("agent.socket", config.agent.socket == base.agent.socket),
            ("registry.signing_key", config.registry.signing_key == base.registry.signing_key),
        ] {
            if !fixed {
                return Err(Failed(format!(
                    "{} sets {name}, which the data folder decides: remove that line",
                    place(&folder.path).display()
                )));
            }
        }
        Ok((text, config))
    }
}

fn lay_over(base: &mut toml::Table, over: &toml::Table) {
    for (key, value) in over {
        match (base.get_mut(key), value) {
            (Some(toml::Value::Table(base)), toml::Value::Table(over)) => lay_over(base, over),
            _ => {
                base.insert(key.clone(), value.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> toml::Table {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_set_takes_the_place_of_what_the_folder_gives_and_nothing_more() {
        let mut base = table("a = 1\n[server]\nlisten = \"x\"\nworkers = 2\n[log]\nlevel = \"info\"\n");
        lay_over(&mut base, &table("[server]\nlisten = \"y\"\n[access]\nmonths = 3\n"));
        assert_eq!(
            base,
            table(
                "a = 1\n[server]\nlisten = \"y\"\nworkers = 2\n[log]\nlevel = \"info\"\n[access]\nmonths = 3\n"
            )
        );
    }

    #[test]
    fn a_given_database_or_registry_is_known_by_its_address() {
        let data = tempfile::tempdir().unwrap();
        let set = |text: &str| {
            std::fs::write(place(data.path()), text).unwrap();
            Overlay::load(data.path())
        };
        assert!(!Overlay::load(data.path()).unwrap().database(), "there is no file");
        let overlay =
            set("[database]\nconnections = 20\n[registry]\nurl = \"http://127.0.0.1:5000\"\n").unwrap();
        assert!(!overlay.database() && overlay.registry());
        assert!(set("[database]\nhost = \"db.internal\"\n").unwrap().database());
        let error = set("[server\n").unwrap_err();
        assert!(error.0.contains("settings.toml cannot be read"), "{error}");
    }
}
