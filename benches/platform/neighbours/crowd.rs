//! A crowd of connections, in a separate process: `platform crowd MODE PORT COUNT SECONDS`. Each connection
//! comes from another loopback address, and a closed connection is reopened.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};

/// Starts the crowd. It ends by itself.
pub(crate) fn spawn(mode: &str, port: u16, count: usize, seconds: u64) -> Child {
    let own = std::env::current_exe().unwrap();
    let args = ["crowd", mode, &port.to_string(), &count.to_string(), &seconds.to_string()];
    // Real strangers have their own processors: lower the priority of the crowd's own work.
    Command::new("nice").args(["-n", "19"]).arg(own).args(args).stdin(Stdio::null()).spawn().unwrap()
}

/// The main function of the crowd process.
pub(crate) fn main(args: &[String]) {
    let number = |at: usize| args[at].parse::<u64>().unwrap();
    let (mode, port) = (args[0].as_str(), u16::try_from(number(1)).unwrap());
    let until = Instant::now() + Duration::from_secs(number(3));
    let mut open: Vec<Option<OwnedFd>> = (0..number(2)).map(|_| None).collect();
    let base = Ipv4Addr::new(127, 16, 0, 1).to_bits() + (std::process::id() % 64) * 0x4_0000;
    let mut sent = vec![0_usize; open.len()];
    while Instant::now() < until {
        for (n, place) in open.iter_mut().enumerate() {
            if Instant::now() >= until {
                break;
            }
            if place.as_ref().is_some_and(is_closed) {
                *place = None;
            }
            if place.is_none() {
                *place = connect(Ipv4Addr::from_bits(base + u32::try_from(n).unwrap()), port);
                sent[n] = 0;
                continue;
            }
            let Some(fd) = place else { continue };
            match mode {
                "heads" if sent[n] < 115_000 => {
                    let text = if sent[n] == 0 {
                        b"GET / HTTP/1.1\r\nHost: localhost\r\n".to_vec()
                    } else {
                        format!("x-{n}-{}: {}\r\n", sent[n], "y".repeat(8000)).into_bytes()
                    };
                    sent[n] += rustix::net::send(fd, &text, SendFlags::NOSIGNAL).unwrap_or(0);
                }
                "drip" => {
                    let _ = rustix::net::send(fd, b"G", SendFlags::NOSIGNAL);
                }
                _ => {}
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn is_closed(fd: &OwnedFd) -> bool {
    let mut buffer = [0; 512];
    match rustix::net::recv(fd, &mut buffer, RecvFlags::DONTWAIT) {
        Ok((0, _)) => true,
        Ok(_) => false,
        Err(error) => error != rustix::io::Errno::AGAIN && error != rustix::io::Errno::NOTCONN,
    }
}

fn connect(from: Ipv4Addr, port: u16) -> Option<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let fd = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).ok()?;
    sockopt::set_socket_reuseaddr(&fd, true).ok()?;
    rustix::net::bind(&fd, &SocketAddrV4::new(from, 0)).ok()?;
    match rustix::net::connect(&fd, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Some(fd),
        Err(_) => None,
    }
}
