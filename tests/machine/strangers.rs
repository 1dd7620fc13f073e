//! Strangers against the real `serve`: a crowd of connections from many addresses, silent or with half a
//! head. Other clients get answers throughout.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketType};

use crate::support::{HTTPD, Machine};

fn connect_from(source: [u8; 4], to: SocketAddr) -> Option<TcpStream> {
    let socket = rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .ok()?;
    rustix::net::bind(&socket, &SocketAddr::from((source, 0))).ok()?;
    rustix::net::connect(&socket, &to).ok()?;
    let stream = TcpStream::from(socket);
    stream.set_write_timeout(Some(Duration::from_secs(1))).ok()?;
    Some(stream)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_from_many_addresses_does_not_lock_others_out() {
    let machine = Machine::start().await;
    let to = SocketAddr::from(([127, 0, 0, 1], machine.port));
    let before = machine.memory("VmRSS");
    let crowd = tokio::task::spawn_blocking(move || {
        let head = format!("GET / HTTP/1.1\r\nhost: x\r\nx: {}", "a".repeat(15_000));
        let mut crowd = Vec::new();
        for n in 0..9_000_u16 {
            let [high, low] = n.to_be_bytes();
            let Some(mut stream) = connect_from([127, 20 + u8::try_from(n % 8).unwrap(), high, low], to)
            else {
                continue;
            };
            if n % 3 == 0 {
                let _ = stream.write_all(head.as_bytes());
            }
            crowd.push(stream);
        }
        crowd
    });
    let crowd = crowd.await.unwrap();
    assert!(crowd.len() > 8_000, "{} of them connected", crowd.len());
    for _ in 0..10 {
        let asked = Instant::now();
        machine.get("/api/v1/tenants").await;
        assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    }
    let after = machine.memory("VmRSS");
    println!("{before} kB before, {after} kB with {} connections tried", crowd.len());
    assert!(after < 512 << 10, "{after} kB");
    // Database, registry and agent are still reachable: a tenant is created, pushes and deploys.
    let robot = machine.tenant("acme").await;
    machine.push(&robot, "acme/web:1", &HTTPD);
    machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await;
    machine.running("acme", "web").await;
    drop(crowd);
}
