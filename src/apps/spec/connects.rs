//! The field `connects`: names of services, apps and egress targets.

use std::str::FromStr;

use super::Connects;
use super::fields;
use super::read::{SpecWalk, get};
use super::tree::{SpecNode, Value};
use crate::fault::catalogue as code;
use crate::ids::{AppName, NameError};

impl SpecWalk<'_, '_> {
    pub(super) fn connects(
        &mut self,
        node: Option<&SpecNode<'_>>,
        own: Option<&AppName>,
    ) -> Option<Connects> {
        let Some(node) = node else { return Some(Connects::default()) };
        let entries = self.group(node, "connects", fields::CONNECTS)?;
        let services = self.names(get(entries, "services"), "connects.services");
        let apps = self.names(get(entries, "apps"), "connects.apps");
        let egress = self.names(get(entries, "egress"), "connects.egress");
        let connects = Connects { services: services?, apps: apps?, egress: egress? };
        if connects.apps.iter().any(|app| app.tenant.is_none() && Some(&app.app) == own) {
            self.bad(node.at, code::CONNECTS, "connects.apps", "an app cannot connect to itself", "");
        }
        // Inside the app, both would have the same name.
        for app in connects.apps.iter().filter(|app| app.tenant.is_none()) {
            if connects.services.iter().any(|service| service.as_str() == app.app.as_str()) {
                let message =
                    "a service and an app have the same name, which would resolve to both inside the app";
                self.bad(node.at, code::CONNECTS, "connects", message, "give the app another name");
            }
        }
        Some(connects)
    }

    fn names<T: FromStr<Err = NameError> + PartialEq>(
        &mut self,
        node: Option<&SpecNode<'_>>,
        path: &str,
    ) -> Option<Vec<T>> {
        let Some(node) = node else { return Some(Vec::new()) };
        let Value::List(items) = &node.value else {
            self.wrong(node, path, "a list of names");
            return None;
        };
        let mut names: Vec<T> = Vec::new();
        for (n, item) in items.iter().enumerate() {
            let path = || format!("{path}[{n}]");
            let Some(text) = self.text(item, path) else { continue };
            match text.parse() {
                Ok(name) if names.contains(&name) => {
                    self.bad(item.at, code::CONNECTS, &path(), "this name is listed twice", "");
                }
                Ok(name) => names.push(name),
                Err(error) => self.bad(item.at, code::NAME, &path(), &error.to_string(), ""),
            }
        }
        if items.len() > fields::MOST_CONNECTS {
            let message = format!("has at most {} names", fields::MOST_CONNECTS);
            self.bad(node.at, code::CONNECTS, path, &message, "");
        }
        Some(names)
    }
}
