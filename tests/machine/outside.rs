//! The outside world of a test: a network namespace with addresses that lead nowhere else, and its servers.
//! No packet leaves the machine.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::run;

/// Runs a function within a network namespace, on its own thread.
pub(crate) fn within<T: Send + 'static>(place: &str, what: impl FnOnce() -> T + Send + 'static) -> T {
    let place = place.to_owned();
    std::thread::spawn(move || {
        enter(&place);
        what()
    })
    .join()
    .unwrap()
}

fn enter(place: &str) {
    let file = std::fs::File::open(place).unwrap_or_else(|error| panic!("{place}: {error}"));
    let network = Some(rustix::thread::LinkNameSpaceType::Network);
    rustix::thread::move_into_link_name_space(file.as_fd(), network).unwrap();
}

/// Returns the namespace of a process.
pub(crate) fn of(pid: &str) -> String {
    format!("/proc/{pid}/ns/net")
}

/// The slices of the address space that tests have taken.
static TAKEN: Mutex<[bool; 15]> = Mutex::new([false; 15]);

/// The outside world of one test.
pub(crate) struct Outside {
    name: String,
    slice: u8,
    stop: Arc<AtomicBool>,
}

impl Outside {
    pub(crate) fn new() -> Self {
        let mut taken = TAKEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let free = taken.iter().position(|taken| !taken).unwrap();
        taken[free] = true;
        drop(taken);
        let slice = u8::try_from(free).unwrap();
        let letters: String = (0..6).map(|_| char::from(b'a' + rand::random::<u8>() % 26)).collect();
        let outside = Self { name: format!("bkt{letters}"), slice, stop: Arc::default() };
        let name = outside.name.as_str();
        let (near, far) = (format!("198.18.{slice}.1"), format!("198.18.{slice}.2"));
        let must = |args: &[&str]| {
            let (good, text) = run("ip", args);
            assert!(good, "ip {args:?}: {text}");
        };
        must(&["netns", "add", name]);
        must(&["link", "add", name, "type", "veth", "peer", "name", "world", "netns", name]);
        must(&["addr", "add", &format!("{near}/30"), "dev", name]);
        must(&["link", "set", name, "up"]);
        must(&["-n", name, "link", "set", "lo", "up"]);
        must(&["-n", name, "addr", "add", &format!("{far}/30"), "dev", "world"]);
        must(&["-n", name, "link", "set", "world", "up"]);
        must(&["-n", name, "route", "add", "default", "via", &near]);
        for address in outside.addresses() {
            must(&["-n", name, "addr", "add", &format!("{address}/32"), "dev", "lo"]);
            must(&["route", "add", &format!("{address}/32"), "via", &far]);
        }
        outside
    }

    fn addresses(&self) -> [Ipv4Addr; 5] {
        [self.allowed(), self.other(), self.service(), self.metadata(), self.private()]
    }

    /// Returns a public address.
    pub(crate) fn allowed(&self) -> Ipv4Addr {
        Ipv4Addr::new(192, 88, 99, self.slice * 16 + 1)
    }
    /// Returns another public address.
    pub(crate) fn other(&self) -> Ipv4Addr {
        Ipv4Addr::new(192, 88, 99, self.slice * 16 + 2)
    }
    /// Returns the address of a platform service, in a private range.
    pub(crate) fn service(&self) -> Ipv4Addr {
        Ipv4Addr::new(172, 31, 200 + self.slice, 2)
    }
    /// Returns the metadata address of clouds.
    pub(crate) fn metadata(&self) -> Ipv4Addr {
        Ipv4Addr::new(169, 254, 77 + self.slice, 254)
    }
    /// Returns the address of a neighbour in a private range.
    pub(crate) fn private(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 200, self.slice, 5)
    }

    /// Returns the namespace.
    pub(crate) fn place(&self) -> String {
        format!("/var/run/netns/{}", self.name)
    }

    /// Answers every connection to a port, on all addresses, with `hello`, then echoes its input.
    pub(crate) fn serve(&self, port: u16) {
        let (place, stop) = (self.place(), Arc::clone(&self.stop));
        let (ready, wait) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            enter(&place);
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
            listener.set_nonblocking(true).unwrap();
            ready.send(()).unwrap();
            while !stop.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        std::thread::spawn(move || echo(stream));
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        });
        wait.recv().unwrap();
    }

    /// Starts the name server of this world. It answers from `names`, with a TTL of one second, and records
    /// its queries.
    pub(crate) fn names(&self, names: Vec<(&'static str, Vec<Ipv4Addr>)>) -> Arc<Mutex<Vec<String>>> {
        use hickory_proto::op::{Message, ResponseCode};
        use hickory_proto::rr::{RData, Record, RecordType, rdata};
        let (place, own, stop) = (self.place(), self.far(), Arc::clone(&self.stop));
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let kept = Arc::clone(&asked);
        let (ready, wait) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            enter(&place);
            let socket = UdpSocket::bind((own, 53)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            ready.send(()).unwrap();
            let mut buffer = [0; 1500];
            while !stop.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
                let Ok(question) = Message::from_vec(&buffer[..length]) else { continue };
                let query = question.queries[0].clone();
                let name = query.name().to_lowercase().to_ascii();
                let name = name.trim_end_matches('.').to_owned();
                let mut answer = Message::response(question.metadata.id, question.metadata.op_code);
                answer.metadata.recursion_available = true;
                answer.add_query(query.clone());
                match names.iter().find(|(known, _)| *known == name) {
                    None => answer.metadata.response_code = ResponseCode::NXDomain,
                    Some((_, addresses)) if query.query_type() == RecordType::A => {
                        let record = |a: &Ipv4Addr| {
                            Record::from_rdata(query.name().clone(), 1, RData::A(rdata::A(*a)))
                        };
                        answer.add_answers(addresses.iter().map(record));
                    }
                    Some(_) => {}
                }
                kept.lock().unwrap().push(name);
                let _ = socket.send_to(&answer.to_vec().unwrap(), from);
            }
        });
        wait.recv().unwrap();
        asked
    }

    /// Returns the address at the far end of the link to this world.
    pub(crate) fn far(&self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, self.slice, 2)
    }

    /// Sends ten datagrams per second from the service's address to each earlier sender, until the test ends.
    pub(crate) fn push(&self, port: u16) {
        let (place, own, stop) = (self.place(), self.service(), Arc::clone(&self.stop));
        let (ready, wait) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            enter(&place);
            let socket = UdpSocket::bind((own, port)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            ready.send(()).unwrap();
            let mut known: Option<SocketAddr> = None;
            while !stop.load(Ordering::Relaxed) {
                let mut buffer = [0; 64];
                if let Ok((_, from)) = socket.recv_from(&mut buffer) {
                    known = Some(from);
                }
                if let Some(to) = known {
                    let _ = socket.send_to(b"hello", to);
                }
            }
        });
        wait.recv().unwrap();
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for address in self.addresses() {
            run("ip", &["route", "del", &format!("{address}/32")]);
        }
        run("ip", &["link", "del", &self.name]);
        run("ip", &["netns", "del", &self.name]);
        TAKEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)[usize::from(self.slice)] = false;
    }
}

fn echo(mut stream: TcpStream) {
    stream.set_nonblocking(false).unwrap();
    let _ = stream.write_all(b"hello\n");
    let mut buffer = [0; 1024];
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
}

/// Returns whether the server greets, from within a namespace. An opened connection alone proves nothing.
pub(crate) fn greets(place: &str, target: Ipv4Addr, port: u16) -> bool {
    within(place, move || greeting(target, port).is_some())
}

fn greeting(target: Ipv4Addr, port: u16) -> Option<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&(target, port).into(), Duration::from_millis(1500)).ok()?;
    stream.set_read_timeout(Some(Duration::from_millis(1500))).ok()?;
    // A web server waits for a request; other servers greet first.
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
    let mut buffer = [0; 512];
    let n = stream.read(&mut buffer).ok()?;
    String::from_utf8_lossy(&buffer[..n])
        .contains(if buffer.starts_with(b"HTTP") { "200" } else { "hello" })
        .then_some(stream)
}

/// A live connection: sends and receives repeatedly until it is cut.
pub(crate) struct Live {
    rounds: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

impl Live {
    /// Over TCP, to an echo server.
    pub(crate) fn tcp(place: &str, target: Ipv4Addr, port: u16) -> Self {
        let live = Self { rounds: Arc::default(), stop: Arc::default() };
        let (rounds, stop, place) = (Arc::clone(&live.rounds), Arc::clone(&live.stop), place.to_owned());
        std::thread::spawn(move || {
            enter(&place);
            let Some(mut stream) = greeting(target, port) else { return };
            let mut buffer = [0; 64];
            let _ = stream.set_read_timeout(Some(Duration::from_millis(300)));
            while !stop.load(Ordering::Relaxed) {
                if stream.write_all(b"x").is_ok() && stream.read(&mut buffer).is_ok_and(|n| n > 0) {
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        live
    }

    /// Over UDP: sends once, then only receives pushed datagrams.
    pub(crate) fn udp(place: &str, target: Ipv4Addr, port: u16) -> Self {
        let live = Self { rounds: Arc::default(), stop: Arc::default() };
        let (rounds, stop, place) = (Arc::clone(&live.rounds), Arc::clone(&live.stop), place.to_owned());
        std::thread::spawn(move || {
            enter(&place);
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            let _ = socket.set_read_timeout(Some(Duration::from_millis(200)));
            let _ = socket.send_to(b"hello?", (target, port));
            let mut buffer = [0; 64];
            while !stop.load(Ordering::Relaxed) {
                if socket.recv_from(&mut buffer).is_ok() {
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        live
    }

    pub(crate) fn rounds(&self) -> usize {
        self.rounds.load(Ordering::Relaxed)
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
