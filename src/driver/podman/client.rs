//! Client of the engine's API over its socket. It has only the calls that Bulkhead needs, and every call has a time
//! limit.

use std::path::Path;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::driver::Error;

/// A client of the engine.
#[derive(Debug, Clone)]
pub struct Podman {
    client: reqwest::Client,
}

/// A container in the engine's list.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ListedContainer {
    /// Id in the engine.
    pub id: String,
    /// Names.
    #[serde(default)]
    pub names: Vec<String>,
    /// Labels. Only Bulkhead's own are read: an image brings any number of labels.
    #[serde(default)]
    labels: Option<OwnLabels>,
    /// State as the engine reports it. It is not trusted alone.
    #[serde(default)]
    pub state: String,
    /// Process id.
    #[serde(default)]
    pub pid: i32,
    /// Exit code of the last run.
    #[serde(default)]
    pub exit_code: i32,
}

#[derive(Debug, Clone, Deserialize)]
struct OwnLabels {
    #[serde(rename = "bulkhead.app-id")]
    app: Option<String>,
}

impl ListedContainer {
    /// Returns the app that the container belongs to.
    #[must_use]
    pub fn app(&self) -> Option<&str> {
        self.labels.as_ref()?.app.as_deref()
    }

    /// Returns the name of the container.
    #[must_use]
    pub fn name(&self) -> &str {
        self.names.first().map(String::as_str).unwrap_or_default()
    }
}

/// The parts of an inspection that Bulkhead uses.
#[derive(Debug, Clone)]
pub struct Inspected {
    /// Process id.
    pub pid: i32,
    /// Process id of the container's monitor.
    pub conmon: i32,
    /// Path of its network namespace.
    pub sandbox: String,
    /// Path of its hosts file.
    pub hosts: String,
    /// State as the engine reports it.
    pub state: String,
    /// Exit code of the last run.
    pub exit_code: i32,
    /// Id in the engine.
    pub id: String,
    /// Keys of its annotations.
    pub annotations: Vec<String>,
    /// The command of its health check.
    pub healthcheck: Vec<String>,
}

/// The parts of an image in the engine's store that Bulkhead uses.
#[derive(Debug, Clone)]
pub struct ImageSeen {
    /// Id.
    pub id: String,
    /// Folders of its layers, topmost first.
    pub layers: Vec<std::path::PathBuf>,
    /// `ENV`.
    pub env: Vec<String>,
    /// `WORKDIR`.
    pub working_dir: String,
    /// `STOPSIGNAL`.
    pub stop_signal: String,
    /// `ENTRYPOINT`.
    pub entrypoint: Vec<String>,
    /// `CMD`.
    pub cmd: Vec<String>,
}

fn away(error: impl std::fmt::Display) -> Error {
    Error::Away(format!("the container engine does not answer: {error}"))
}

impl Podman {
    /// Creates a client of the engine behind this socket.
    pub fn new(socket: &Path) -> Result<Self, Error> {
        let client = crate::outgoing::client().unix_socket(socket).build().map_err(away)?;
        Ok(Self { client })
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        patience: Duration,
    ) -> Result<(StatusCode, Value), Error> {
        let mut request =
            self.client.request(method, format!("http://engine/v4.0.0/libpod/{path}")).timeout(patience);
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await.map_err(away)?;
        let status = answer.status();
        let text = answer.text().await.map_err(away)?;
        Ok((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
    }

    /// Calls the engine. Any status other than success or one of `also` is an error with the engine's text.
    async fn expect(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        also: &[u16],
        patience: u64,
    ) -> Result<Value, Error> {
        let (status, value) = self.call(method, path, body, Duration::from_secs(patience)).await?;
        if status.is_success() || also.contains(&status.as_u16()) {
            return Ok(value);
        }
        let text =
            value["message"].as_str().or(value["cause"].as_str()).unwrap_or("no reason given").to_owned();
        if status == StatusCode::CONFLICT {
            return Err(Error::Conflict(text));
        }
        Err(Error::Transient(text))
    }

    /// Checks that the engine answers.
    pub async fn ping(&self) -> Result<(), Error> {
        self.expect(Method::GET, "_ping", None, &[], 2).await.map(drop)
    }

    /// Lists all containers of an installation. The time limit `patience` includes the body.
    pub async fn list(&self, installation: &str, patience: Duration) -> Result<Vec<ListedContainer>, Error> {
        let filter = json!({"label": [format!("bulkhead.installation={installation}")]}).to_string();
        let path = format!("containers/json?all=true&filters={}", escape(&filter));
        let request = self.client.get(format!("http://engine/v4.0.0/libpod/{path}"));
        let answer = request.timeout(patience).send().await.map_err(away)?;
        let answer = answer.error_for_status().map_err(away)?;
        // Parsed straight into the fields that are needed: the answer holds every label of every image.
        let bytes = answer.bytes().await.map_err(away)?;
        let list: Option<Vec<ListedContainer>> = serde_json::from_slice(&bytes).map_err(away)?;
        Ok(list.unwrap_or_default())
    }

    /// Whether the engine has an image.
    pub async fn has_image(&self, image: &str) -> Result<bool, Error> {
        let path = format!("images/{}/exists", escape(image));
        let (status, _) = self.call(Method::GET, &path, None, Duration::from_secs(20)).await?;
        Ok(status.is_success())
    }

    /// Reads one image; none when the engine does not have it.
    pub async fn image(&self, image: &str) -> Result<Option<ImageSeen>, Error> {
        let path = format!("images/{}/json", escape(image));
        let (status, value) = self.call(Method::GET, &path, None, Duration::from_secs(20)).await?;
        if status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        if !status.is_success() {
            return Err(away(status));
        }
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let folders = &value["GraphDriver"]["Data"];
        let lower = folders["LowerDir"].as_str().into_iter().flat_map(|list| list.split(':'));
        let layers = folders["UpperDir"].as_str().into_iter().chain(lower).map(Into::into).collect();
        let config = &value["Config"];
        Ok(Some(ImageSeen {
            id: text(&value["Id"]),
            layers,
            env: config["Env"].as_array().into_iter().flatten().map(text).collect(),
            working_dir: text(&config["WorkingDir"]),
            stop_signal: text(&config["StopSignal"]),
            entrypoint: config["Entrypoint"].as_array().into_iter().flatten().map(text).collect(),
            cmd: config["Cmd"].as_array().into_iter().flatten().map(text).collect(),
        }))
    }

    /// Lists all images: id, and the names with digests under which the engine knows each.
    pub async fn images(&self) -> Result<Vec<(String, Vec<String>)>, Error> {
        let value = self.expect(Method::GET, "images/json", None, &[], 60).await?;
        let list = value.as_array().cloned().unwrap_or_default();
        Ok(list
            .iter()
            .filter_map(|image| {
                let names = image["RepoDigests"].as_array().into_iter().flatten();
                let names = names.filter_map(|name| name.as_str().map(str::to_owned)).collect();
                Some((image["Id"].as_str()?.to_owned(), names))
            })
            .collect())
    }

    /// Removes an image that no container uses; an image in use stays. Returns whether nothing of the image is
    /// left.
    ///
    /// Names are removed one by one. The engine refuses to remove an image with several names by its id, and the
    /// last name removes the image. The removal is never forced: that would also remove a running container.
    pub async fn remove_image(&self, id: &str, names: &[String]) -> Result<bool, Error> {
        let id = id.to_owned();
        let all = if names.is_empty() { std::slice::from_ref(&id) } else { names };
        for name in all {
            let path = format!("images/{}?force=false", escape(name));
            self.expect(Method::DELETE, &path, None, &[404, 409], 60).await?;
        }
        Ok(self.image(&id).await?.is_none())
    }

    /// Creates a container. Returns [`Error::Conflict`] when the name is already in use.
    pub async fn create(&self, spec: &Value) -> Result<(), Error> {
        match self.expect(Method::POST, "containers/create", Some(spec), &[], 30).await {
            Ok(_) => Ok(()),
            Err(Error::Transient(text)) if text.contains("already in use") => Err(Error::Conflict(text)),
            Err(error) => Err(error),
        }
    }

    /// Prepares a container: its namespaces and network exist, but its process has not started.
    pub async fn init(&self, name: &str) -> Result<(), Error> {
        self.expect(Method::POST, &format!("containers/{name}/init"), None, &[304], 30).await.map(drop)
    }

    /// Starts a prepared container.
    pub async fn start(&self, name: &str) -> Result<(), Error> {
        self.expect(Method::POST, &format!("containers/{name}/start"), None, &[304], 30).await.map(drop)
    }

    /// Stops a container: SIGTERM, then SIGKILL after `grace` seconds.
    pub async fn stop(&self, name: &str, grace: u16) -> Result<(), Error> {
        let path = format!("containers/{name}/stop?timeout={grace}");
        self.expect(Method::POST, &path, None, &[304, 404], u64::from(grace) + 20).await.map(drop)
    }

    /// Removes a container in any state.
    pub async fn remove(&self, name: &str) -> Result<(), Error> {
        let path = format!("containers/{name}?force=true&v=true&timeout=0");
        self.expect(Method::DELETE, &path, None, &[404], 60).await.map(drop)
    }

    /// Inspects one container; none when the engine does not have it.
    pub async fn find(&self, name: &str) -> Result<Option<Inspected>, Error> {
        let (status, value) =
            self.call(Method::GET, &format!("containers/{name}/json"), None, Duration::from_secs(10)).await?;
        if status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        if !status.is_success() {
            return Err(away(status));
        }
        let number = |value: &Value| value.as_i64().and_then(|n| i32::try_from(n).ok()).unwrap_or(0);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let healthcheck = value["Config"]["Healthcheck"]["Test"].as_array();
        Ok(Some(Inspected {
            state: text(&value["State"]["Status"]),
            exit_code: number(&value["State"]["ExitCode"]),
            id: text(&value["Id"]),
            annotations: value["Config"]["Annotations"]
                .as_object()
                .map(|list| list.keys().cloned().collect())
                .unwrap_or_default(),
            healthcheck: healthcheck.into_iter().flatten().map(text).collect(),
            pid: number(&value["State"]["Pid"]),
            conmon: number(&value["State"]["ConmonPid"]),
            sandbox: text(&value["NetworkSettings"]["SandboxKey"]),
            hosts: text(&value["HostsPath"]),
        }))
    }

    /// Inspects one container that must exist.
    pub async fn inspect(&self, name: &str) -> Result<Inspected, Error> {
        self.find(name).await?.ok_or_else(|| Error::Transient("the container does not exist".into()))
    }

    /// Ensures that a network exists, and returns whether it was created. The engine assigns no addresses; Bulkhead
    /// does. The engine would never free the address of an instance that ends by itself.
    pub async fn ensure_network(&self, name: &str) -> Result<bool, Error> {
        let (status, _) =
            self.call(Method::GET, &format!("networks/{name}/exists"), None, Duration::from_secs(20)).await?;
        if status.is_success() {
            return Ok(false);
        }
        let body = json!({
            "name": name, "driver": "bridge", "network_interface": name, "internal": false, "dns_enabled": false,
            "ipv6_enabled": false, "ipam_options": {"driver": "none"},
        });
        self.expect(Method::POST, "networks/create", Some(&body), &[], 20).await?;
        Ok(true)
    }

    /// Removes a network.
    pub async fn remove_network(&self, name: &str) -> Result<(), Error> {
        self.expect(Method::DELETE, &format!("networks/{name}"), None, &[404], 60).await.map(drop)
    }

    /// Lists the names of all networks.
    pub async fn networks(&self) -> Result<Vec<String>, Error> {
        let value = self.expect(Method::GET, "networks/json", None, &[], 20).await?;
        let list = value.as_array().cloned().unwrap_or_default();
        Ok(list.iter().filter_map(|network| network["name"].as_str().map(str::to_owned)).collect())
    }
}

/// Percent-encodes everything except unreserved characters (RFC 3986).
fn escape(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut out, b| {
        if b.is_ascii_alphanumeric() || b"-._~".contains(&b) {
            out.push(char::from(b));
        } else {
            let _ = write!(out, "%{b:02X}");
        }
        out
    })
}
