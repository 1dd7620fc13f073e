//! The isolation of an instance, tested from inside: system calls, namespaces, /proc, limits. Ordinary
//! programs of many kinds still run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Image, Machine, layer_with, run};

/// Builds the program that makes system calls, statically linked.
fn probe(dir: &Path) -> Vec<u8> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machine/golden/probe.c");
    let target = dir.join("probe");
    let done = Command::new("gcc").args(["-static", "-O1", "-o"]).arg(&target).arg(source).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    fs::read(target).unwrap()
}

fn push(
    machine: &Machine,
    robot: &(String, String),
    name: &str,
    command: &[&str],
    more: &[(String, Vec<u8>, u32)],
) {
    let dir = tempfile::tempdir().unwrap();
    let (layer, size) = layer_with(dir.path(), more);
    Image::of(command).write(dir.path(), &layer, size);
    let (good, text) = machine.copy(robot, dir.path(), name);
    assert!(good, "{text}");
}

/// Waits for a file that an instance writes at its end, as the host sees it.
async fn written(pid: &str, name: &str, seconds: u64) -> String {
    let path = format!("/proc/{pid}/root/tmp/{name}");
    for _ in 0..seconds * 5 {
        if let Ok(text) = fs::read_to_string(&path) {
            return text;
        }
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    panic!("{path} is not written; there are {:?}", run("ls", &["-l", &format!("/proc/{pid}/root/tmp")]).1);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_system_call_answers_as_on_record() {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    let dir = tempfile::tempdir().unwrap();
    let script = "probe > /tmp/part; busybox mv /tmp/part /tmp/matrix; busybox sleep 1000";
    let files = [("bin/probe".to_owned(), probe(dir.path()), 0o755)];
    push(&machine, &robot, "acme/probe:1", &["/bin/busybox", "sh", "-c", script], &files);
    machine.deploy("acme", "probe", "image: probe:1\n").await;
    let app = machine.running("acme", "probe").await;
    let pid = machine.pid(&app["observed"]["instances"][0]);
    let seen = written(&pid, "matrix", 20).await;
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machine/golden/syscalls.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&golden, &seen).unwrap();
    }
    let wanted = fs::read_to_string(&golden).unwrap();
    assert!(wanted.lines().count() > 120);
    for (seen, wanted) in seen.lines().zip(wanted.lines()) {
        assert_eq!(seen, wanted);
    }
    assert_eq!(seen.lines().count(), wanted.lines().count());

    second_lines(&pid);
    hidden(&machine, app["observed"]["instances"][0]["container"].as_str().unwrap());
}

/// The second line of defence behind the filter: the kernel allows an instance no user namespaces. Also
/// checks limits.
fn second_lines(pid: &str) {
    let user = format!("--user=/proc/{pid}/ns/user");
    let (good, most) = run("nsenter", &[&user, "sysctl", "-n", "user.max_user_namespaces"]);
    assert!(good && most.trim() == "0", "{most}");
    // From within, with all rights and no filter: the kernel refuses because of the number.
    let (good, text) = run("nsenter", &[&user, "unshare", "--user", "true"]);
    assert!(!good && text.contains("No space left"), "{text}");
    assert!(
        fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap().trim() != "0",
        "the host's own limit stays"
    );

    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..].split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(limit("Max core file size"), ["0", "0"]);
    assert_eq!(limit("Max locked memory"), ["65536", "65536"]);
    assert_eq!(limit("Max msgqueue size"), ["262144", "262144"]);
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim(), "500");
}

/// Files that reveal the machine are empty or missing.
fn hidden(machine: &Machine, container: &str) {
    let script = "for f in /proc/cmdline /proc/diskstats /proc/config.gz /proc/iomem /proc/kallsyms /proc/kcore /proc/keys \
                  /proc/timer_list /proc/sched_debug /proc/modules /proc/kmsg /proc/partitions /proc/swaps /proc/interrupts \
                  /proc/vmallocinfo /proc/slabinfo /proc/pressure/* /proc/acpi/* /sys/kernel/* /sys/firmware/* \
                  /sys/devices/virtual/dmi/* /sys/dev/block/*; do \
                  n=$(busybox head -c 100 \"$f\" 2>/dev/null | busybox wc -c); [ \"$n\" = 0 ] || echo \"$f: $n bytes\"; done; \
                  busybox wc -l < /proc/meminfo";
    let (good, text) = machine.podman(&["exec", container, "/bin/busybox", "sh", "-c", script]);
    assert!(good, "{text}");
    assert!(
        text.trim().parse::<u32>().is_ok_and(|lines| lines > 10),
        "programs see only the files that they need: {text}"
    );
}

/// Files of this machine for an image: programs, folders, and their linked libraries.
struct Files {
    list: Vec<(String, Vec<u8>, u32)>,
    known: std::collections::BTreeSet<PathBuf>,
}

impl Files {
    fn add(&mut self, path: &Path) {
        if path.is_dir() {
            let mut inner: Vec<PathBuf> =
                fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
            inner.sort();
            for path in inner.iter().filter(|path| !path.ends_with("test") && !path.ends_with("__pycache__"))
            {
                self.add(path);
            }
            return;
        }
        // Programs also name their libraries as "lib/../bin/x", which is not a valid path in an archive.
        let plain = if path.components().any(|part| part.as_os_str() == "..") {
            path.canonicalize().unwrap()
        } else {
            path.to_owned()
        };
        let path = plain.as_path();
        if !path.is_file() || !self.known.insert(path.to_owned()) {
            return;
        }
        let bytes = fs::read(path).unwrap();
        let program = bytes.starts_with(b"\x7fELF");
        self.list.push((path.strip_prefix("/").unwrap().display().to_string(), bytes, 0o755));
        if program {
            for word in run("ldd", &[&path.display().to_string()]).1.split_whitespace() {
                if word.starts_with('/') && !word.ends_with(':') {
                    self.add(Path::new(word));
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_of_many_kinds_run_behind_the_filter() {
    let python = "import subprocess, multiprocessing, asyncio, threading\n\
        q = multiprocessing.get_context('fork').Queue()\n\
        p = multiprocessing.Process(target=lambda: q.put(7)); p.start(); q.get(); p.join()\n\
        async def main():\n  s = await asyncio.start_server(lambda r, w: w.close(), '127.0.0.1', 0)\n  \
        r, w = await asyncio.open_connection(*s.sockets[0].getsockname()); await r.read()\n\
        asyncio.run(main()); subprocess.run(['/bin/busybox', 'true'], check=True); print('good')\n";
    let node = "const {Worker}=require('worker_threads'),http=require('http'),cp=require('child_process');\
        new Worker('require(\"worker_threads\").parentPort.postMessage(1)',{eval:true}).on('message',()=>{\
        const s=http.createServer((q,r)=>r.end('x')).listen(0,'127.0.0.1',()=>http.get({port:s.address().port,host:'127.0.0.1'},\
        r=>{r.resume();r.on('end',()=>{s.close();cp.execFileSync('/bin/busybox',['true']);console.log('good')})}))});";
    // Name, the file it needs on this machine, and the script of the instance, whose last line is "good". A
    // cluster needs more of /dev/shm than an instance has; the test starts its server without one.
    let postgres = "b=/usr/lib/postgresql/15/bin; $b/initdb --version && $b/postgres --describe-config > /tmp/pg && \
        busybox test -s /tmp/pg && echo good";
    let programs: [(&str, &[&str], &str); 6] = [
        ("python", &["/usr/bin/python3.11", "/usr/lib/python3.11"], "/usr/bin/python3.11 /app/a.py"),
        ("node", &["/usr/bin/node"], "/usr/bin/node /app/a.js"),
        (
            "java",
            &[
                "/usr/lib/jvm/java-17-openjdk-amd64/lib",
                "/usr/lib/jvm/java-17-openjdk-amd64/bin/java",
                "/etc/java-17-openjdk",
            ],
            "/usr/lib/jvm/java-17-openjdk-amd64/bin/java -Xmx64m -Xlog:gc -version && echo good",
        ),
        (
            "postgres",
            &["/usr/lib/postgresql/15/bin", "/usr/lib/postgresql/15/lib", "/usr/share/postgresql/15"],
            postgres,
        ),
        (
            "go",
            &["/usr/bin/docker-registry"],
            "busybox printf 'version: 0.1\\nstorage: {inmemory: {}}\\nhttp: {addr: 127.0.0.1:5000}\\n' > /tmp/r.yml; \
             /usr/bin/docker-registry serve /tmp/r.yml & busybox sleep 2; busybox wget -q -O /tmp/v2 http://127.0.0.1:5000/v2/ && echo good",
        ),
        (
            "redis",
            &["/usr/bin/redis-server", "/usr/bin/redis-cli"],
            "/usr/bin/redis-server --dir /tmp --port 6379 & busybox sleep 1; \
             /usr/bin/redis-cli set a 1; /usr/bin/redis-cli save && echo good",
        ),
    ];
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    let mut tried = Vec::new();
    for (name, paths, script) in programs {
        if !paths.iter().all(|path| Path::new(path).exists()) {
            println!("{name} is not on this machine");
            continue;
        }
        let mut files = Files { list: Vec::new(), known: std::collections::BTreeSet::new() };
        for path in paths {
            files.add(Path::new(path));
        }
        files.list.push(("app/a.py".into(), python.into(), 0o644));
        files.list.push(("app/a.js".into(), node.into(), 0o644));
        let script =
            format!("({script}) > /tmp/part 2>&1; busybox cp /tmp/part /tmp/said; busybox sleep 1000");
        push(
            &machine,
            &robot,
            &format!("acme/{name}:1"),
            &["/bin/busybox", "sh", "-c", &script],
            &files.list,
        );
        let spec = format!(
            "spec: v1\nname: {name}\nimage: {name}:1\ncpu: 2\nmemory: 512Mi\nsingleton: true\nstop_grace: 1\n\
             env: {{ PYTHONHOME: /usr, LD_LIBRARY_PATH: /usr/lib/x86_64-linux-gnu:/lib/x86_64-linux-gnu, HOME: /tmp }}\n\
             scratch: {{ /tmp: 128Mi }}\n"
        );
        let path = format!("/api/v1/tenants/acme/apps/{name}");
        let (status, answer) =
            machine.ask(&machine.admin, "PUT", &path, Some(("application/yaml", spec))).await;
        assert_eq!(status, 202, "{name}: {answer}");
        let app = machine.running("acme", name).await;
        let said = written(&machine.pid(&app["observed"]["instances"][0]), "said", 60).await;
        assert_eq!(said.trim_end().lines().last(), Some("good"), "{name}: {said}");
        let (status, _) = machine.ask(&machine.admin, "DELETE", &path, None).await;
        assert_eq!(status, 202);
        tried.push(name);
    }
    println!("ran: {tried:?}");
    assert!(tried.contains(&"postgres") && tried.contains(&"go"), "every installation has both packages");
}
