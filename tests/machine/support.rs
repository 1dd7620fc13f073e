//! A whole installation for a test: the real `bulkhead up` on a folder of its own, with its own database,
//! registry and engine. Dropping it removes everything, even after a failed test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead::ids::Digest;
use serde_json::{Value, json};

/// A running installation.
pub(crate) struct Machine {
    pub(crate) data: PathBuf,
    pub(crate) port: u16,
    pub(crate) admin: String,
    pub(crate) id: String,
    disk: bool,
    up: Option<Child>,
    client: reqwest::Client,
}

fn bulkhead(args: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_bulkhead")).args(args).stdin(Stdio::null()).output().unwrap()
}

pub(crate) fn run(program: &str, args: &[&str]) -> (bool, String) {
    let done = Command::new(program).args(args).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    (done.status.success(), text)
}

impl Machine {
    pub(crate) async fn start() -> Self {
        Self::start_with(None).await
    }

    /// Starts one with a data folder on its own disk, in memory.
    pub(crate) async fn on_a_disk_of(size: &str) -> Self {
        Self::start_with(Some(size)).await
    }

    async fn start_with(disk: Option<&str>) -> Self {
        let name: String = (0..6).map(|_| char::from(b'a' + rand::random::<u8>() % 26)).collect();
        let data = PathBuf::from(format!("/tmp/bulkhead-test-{name}"));
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        if let Some(size) = disk {
            fs::create_dir_all(&data).unwrap();
            let place = data.display().to_string();
            let (good, text) =
                run("mount", &["-t", "tmpfs", "-o", &format!("size={size},mode=755"), "tmpfs", &place]);
            assert!(good, "{text}");
        }
        let mut machine = Self {
            data,
            disk: disk.is_some(),
            port,
            admin: String::new(),
            id: String::new(),
            up: None,
            client: bulkhead::outgoing::client().build().unwrap(),
        };
        machine.up().await;
        machine.id = machine.agent_config()["installation"].as_str().unwrap().into();
        machine.admin = machine.token(&["--admin", "--name", "test"]);
        machine
    }

    /// Starts `up` and waits until it is ready.
    pub(crate) async fn up(&mut self) {
        fs::create_dir_all(&self.data).unwrap();
        let log = PathBuf::from(format!("{}.out", self.data.display()));
        let out = fs::File::create(&log).unwrap();
        let data = self.data.display().to_string();
        let child = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
            .args(["up", "--data", &data, "--listen", &format!("127.0.0.1:{}", self.port)])
            .stdin(Stdio::null())
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .spawn()
            .unwrap();
        self.up = Some(child);
        let begun = Instant::now();
        loop {
            let text = fs::read_to_string(&log).unwrap();
            if text.contains("Ctrl-C stops") {
                return;
            }
            let ended = self.up.as_mut().unwrap().try_wait().unwrap();
            assert!(
                ended.is_none() && begun.elapsed() < Duration::from_secs(60),
                "up does not start:\n{text}"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Stops `up` as Ctrl-C does.
    pub(crate) fn down(&mut self) {
        if let Some(mut child) = self.up.take() {
            let _ = run("kill", &["-TERM", &child.id().to_string()]);
            let _ = child.wait();
        }
    }

    /// Name of the installation's nftables table.
    pub(crate) fn table(&self) -> String {
        format!("bulkhead_{}", self.id)
    }

    pub(crate) fn agent_config(&self) -> toml::Table {
        fs::read_to_string(self.data.join("agent.toml")).unwrap().parse().unwrap()
    }

    pub(crate) fn token(&self, args: &[&str]) -> String {
        let data = self.data.display().to_string();
        let mut all = vec!["token", "create", "--data", &data];
        all.extend(args);
        let done = bulkhead(&all);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap().trim().to_owned()
    }

    pub(crate) fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Sends a request with a token. Returns status and body.
    pub(crate) async fn ask(
        &self,
        token: &str,
        method: &str,
        path: &str,
        body: Option<(&str, String)>,
    ) -> (u16, Value) {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = self.client.request(method, format!("{}{path}", self.address()));
        if !token.is_empty() {
            request = request.bearer_auth(token);
        }
        if let Some((kind, text)) = body {
            request = request.header("content-type", kind).body(text);
        }
        let answer = request.send().await.unwrap();
        let status = answer.status().as_u16();
        let text = answer.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// The same, for a platform that may be dying: none without a complete answer.
    pub(crate) async fn try_ask(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Option<(u16, Value)> {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = self.client.request(method, format!("{}{path}", self.address()));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = request.bearer_auth(&self.admin).body(body.to_owned()).send().await.ok()?;
        let status = answer.status().as_u16();
        Some((status, serde_json::from_str(&answer.text().await.ok()?).unwrap_or_default()))
    }

    /// Retries, as a careful client does, while the answer is that a part is unavailable.
    pub(crate) async fn insist(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> (u16, Value) {
        let begun = Instant::now();
        loop {
            match self.try_ask(method, path, headers, body).await {
                Some((status, answer)) if status < 500 => return (status, answer),
                other => assert!(
                    begun.elapsed() < Duration::from_secs(60),
                    "{method} {path}: {other:?}\n{}",
                    self.tail("serve")
                ),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Sends a signal to a process of the platform.
    pub(crate) fn signal(&self, name: &str, signal: &str) {
        let text = fs::read_to_string(self.data.join(format!("run/{name}.pid"))).unwrap();
        assert!(run("kill", &[signal, text.split(' ').next().unwrap()]).0, "{name}");
    }

    /// Kills a process of the platform.
    pub(crate) fn kill(&self, name: &str) {
        self.signal(name, "-9");
    }

    /// Changes the database as only time would do.
    pub(crate) fn sql(&self, statement: &str) -> String {
        let socket = self.data.join("run/postgres").display().to_string();
        let (good, text) =
            run("psql", &["-h", &socket, "-U", "postgres", "-d", "bulkhead", "-tAc", statement]);
        assert!(good, "{text}");
        text.trim().to_owned()
    }

    /// Returns the kilobytes of memory that `serve` uses.
    pub(crate) fn memory(&self, field: &str) -> u64 {
        let pid = fs::read_to_string(self.data.join("run/serve.pid")).unwrap();
        let text = fs::read_to_string(format!("/proc/{}/status", pid.split(' ').next().unwrap())).unwrap();
        let line = text.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Kills a process so that the next one of its name dies at a step. Returns when that one is ready.
    pub(crate) async fn arm(&self, name: &str, point: &str) {
        let file = self.data.join(format!("run/{name}.failpoints"));
        fs::write(&file, format!("{point}=panic")).unwrap();
        self.kill(name);
        let begun = Instant::now();
        while file.exists() {
            assert!(begun.elapsed() < Duration::from_secs(30), "{name} does not restart");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        tokio::time::sleep(Duration::from_millis(400)).await;
        // The new process reads the file before it listens.
        while name == "serve" && std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(30), "{name} does not listen");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Returns how often a process has died at a step on purpose.
    pub(crate) fn deaths(&self, name: &str) -> usize {
        let text = fs::read_to_string(self.data.join(format!("log/{name}.log"))).unwrap_or_default();
        text.matches("a failpoint ends this process").count()
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        let (status, body) = self.insist("GET", path, &[], "").await;
        assert_eq!(status, 200, "GET {path}: {body}");
        body
    }

    pub(crate) async fn send(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        self.ask(&self.admin, method, path, Some(("application/json", body.to_string()))).await
    }

    /// Onboards a tenant with a registry credential that may push. Returns its login and secret.
    pub(crate) async fn tenant(&self, name: &str) -> (String, String) {
        let (status, body) = self.send("POST", "/api/v1/tenants", json!({"name": name})).await;
        assert_eq!(status, 202, "{body}");
        let path = format!("/api/v1/tenants/{name}/robots");
        let (status, robot) = self.send("POST", &path, json!({"name": "ci", "push": true})).await;
        assert_eq!(status, 201, "{robot}");
        (robot["login"].as_str().unwrap().to_owned(), robot["secret"].as_str().unwrap().to_owned())
    }

    /// Pushes an image with an ordinary client: busybox with this command.
    pub(crate) fn push(&self, robot: &(String, String), image: &str, command: &[&str]) {
        let (good, text) = self.try_push(robot, image, command);
        assert!(good, "{text}");
    }

    pub(crate) fn try_push(&self, robot: &(String, String), image: &str, command: &[&str]) -> (bool, String) {
        self.push_image(robot, image, &Image::of(command))
    }

    pub(crate) fn push_image(
        &self,
        robot: &(String, String),
        name: &str,
        image: &Image<'_>,
    ) -> (bool, String) {
        let dir = tempfile::tempdir().unwrap();
        let (digest, size) = layer(dir.path());
        image.write(dir.path(), &digest, size);
        self.copy(robot, dir.path(), name)
    }

    /// Pushes the image in a folder, with an ordinary client.
    pub(crate) fn copy(&self, robot: &(String, String), dir: &Path, name: &str) -> (bool, String) {
        let auth = self.auth_file(dir, robot);
        run(
            "skopeo",
            &[
                "copy",
                "--quiet",
                "--insecure-policy",
                "--dest-tls-verify=false",
                "--dest-authfile",
                &auth,
                &format!("oci:{}/image", dir.display()),
                &format!("docker://127.0.0.1:{}/{name}", self.port),
            ],
        )
    }

    pub(crate) fn auth_file(&self, dir: &Path, robot: &(String, String)) -> String {
        let auth = data_encoding::BASE64.encode(format!("{}:{}", robot.0, robot.1).as_bytes());
        let file = dir.join("auth.json");
        let key = format!("127.0.0.1:{}", self.port);
        fs::write(&file, json!({"auths": {key: {"auth": auth}}}).to_string()).unwrap();
        file.display().to_string()
    }

    /// Deploys a spec in YAML.
    pub(crate) async fn deploy(&self, tenant: &str, app: &str, rest: &str) -> (u16, Value) {
        let spec = format!("spec: v1\nname: {app}\ncpu: 50m\nmemory: 64Mi\nstop_grace: 1\n{rest}");
        let path = format!("/api/v1/tenants/{tenant}/apps/{app}");
        self.ask(&self.admin, "PUT", &path, Some(("application/yaml", spec))).await
    }

    pub(crate) async fn app(&self, tenant: &str, app: &str) -> Value {
        self.get(&format!("/api/v1/tenants/{tenant}/apps/{app}")).await
    }

    /// Waits until an app has a state, at most `seconds`.
    pub(crate) async fn wait(
        &self,
        tenant: &str,
        app: &str,
        seconds: u64,
        what: impl Fn(&Value) -> bool,
    ) -> Value {
        let begun = Instant::now();
        loop {
            let now = self.app(tenant, app).await;
            if what(&now) {
                return now;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(seconds),
                "not in time: {now:#}\n{}",
                self.tail("agent")
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    pub(crate) async fn running(&self, tenant: &str, app: &str) -> Value {
        self.wait(tenant, app, 40, |app| {
            app["state"] == "running" && app["observed"]["revision"] == app["revision"]
        })
        .await
    }

    /// Returns the end of a log of the platform.
    pub(crate) fn tail(&self, name: &str) -> String {
        let text = fs::read_to_string(self.data.join(format!("log/{name}.log"))).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(12).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// Calls the installation's own engine.
    pub(crate) fn podman(&self, args: &[&str]) -> (bool, String) {
        let url = format!("unix://{}/run/engine/podman.sock", self.data.display());
        let mut all = vec!["--remote", "--url", &url];
        all.extend(args);
        run("podman", &all)
    }

    /// Returns the process id of an instance's container.
    pub(crate) fn pid(&self, instance: &Value) -> String {
        let (good, text) =
            self.podman(&["inspect", "-f", "{{.State.Pid}}", instance["container"].as_str().unwrap()]);
        assert!(good, "{text}");
        text.trim().to_owned()
    }

    /// Fetches from within the network namespace of an instance. Returns whether the page itself arrived: a
    /// mere connection proves nothing, because a middlebox may accept it.
    pub(crate) fn fetches(&self, instance: &Value, more: &[&str], url: &str) -> bool {
        let pid = self.pid(instance);
        let mut all = vec!["-t", &pid, "-n", "curl", "-s", "-m", "3", "--noproxy", "*"];
        all.extend(more);
        all.push(url);
        let (good, text) = run("nsenter", &all);
        good && text.contains("hello")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("== agent\n{}\n== serve\n{}", self.tail("agent"), self.tail("serve"));
        }
        self.down();
        let data = self.data.display().to_string();
        let done = bulkhead(&["uninstall", "--data", &data, "--confirm", &self.id]);
        if self.disk {
            run("umount", &["-l", &data]);
            let _ = fs::remove_dir_all(&data);
        }
        let _ = fs::remove_file(format!("{data}.out"));
        if !done.status.success() {
            let text = String::from_utf8_lossy(&done.stderr).into_owned();
            assert!(std::thread::panicking(), "uninstall: {text}");
            eprintln!("uninstall: {text}");
        }
        let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        let own = ["", "-engine"].map(|part| format!("bulkhead-{}{part}", self.id));
        let left: Vec<_> = (hierarchies.flat_map(|at| own.clone().map(|own| at.path().join(own))))
            .filter(|at| at.exists())
            .collect();
        assert!(left.is_empty() || std::thread::panicking(), "left by uninstall: {left:?}");
    }
}

/// The properties of an image.
pub(crate) struct Image<'a> {
    pub(crate) user: &'a str,
    pub(crate) architecture: &'a str,
    pub(crate) command: &'a [&'a str],
    pub(crate) annotations: Value,
}

impl<'a> Image<'a> {
    /// Returns a usual image: for this platform, with its own user.
    pub(crate) fn of(command: &'a [&'a str]) -> Self {
        Self { user: "app", architecture: "amd64", command, annotations: json!({}) }
    }

    /// Writes it in the OCI layout, with this layer, which is already among the blobs.
    pub(crate) fn write(&self, dir: &Path, layer: &Digest, size: u64) {
        let blobs = dir.join("image/blobs/sha256");
        let put = |text: String, kind: &str| {
            let digest = Digest::of(text.as_bytes());
            fs::write(blobs.join(&digest.as_str()[7..]), &text).unwrap();
            json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": text.len()})
        };
        let config = json!({
            "architecture": self.architecture, "os": "linux",
            "config": {"User": self.user, "Cmd": self.command},
            "rootfs": {"type": "layers", "diff_ids": [layer]},
        });
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "annotations": self.annotations,
            "config": put(config.to_string(), "config.v1+json"),
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer, "size": size}],
        });
        let index = json!({"schemaVersion": 2, "manifests": [put(manifest.to_string(), "manifest.v1+json")]});
        fs::write(dir.join("image/index.json"), index.to_string()).unwrap();
        fs::write(dir.join("image/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    }
}

/// Writes the layer of all test images: busybox from this machine and a page.
fn layer(dir: &Path) -> (Digest, u64) {
    layer_with(dir, &[])
}

/// Does the same with more files: path, bytes, mode.
pub(crate) fn layer_with(dir: &Path, more: &[(String, Vec<u8>, u32)]) -> (Digest, u64) {
    let busybox = fs::read("/bin/busybox").expect("busybox-static is installed by deploy/packages");
    let mut layer = tar::Builder::new(Vec::new());
    let mut append = |path: &str, bytes: &[u8], mode: u32| {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(mode);
        header.set_mtime(0);
        header.set_cksum();
        layer.append_data(&mut header, path, bytes).unwrap();
    };
    append("bin/busybox", &busybox, 0o755);
    append("bin/sh", &busybox, 0o755);
    append("www/index.html", b"hello\n", 0o644);
    append("etc/passwd", b"app:x:1000:1000::/:/bin/sh\n", 0o644);
    for (path, bytes, mode) in more {
        append(path, bytes, *mode);
    }
    let layer = layer.into_inner().unwrap();
    let digest = Digest::of(&layer);
    let blobs = dir.join("image/blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(&digest.as_str()[7..]), &layer).unwrap();
    (digest, layer.len() as u64)
}

/// The command of a small web server.
pub(crate) const HTTPD: [&str; 6] = ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h/www"];
