//! The HTTP front against strangers: silent crowds, endless heads, stalled bodies, readers that do not read.
//! No database: a small application stands behind the front, because these requests never get further.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use actix_web::middleware::from_fn;
use actix_web::{App, HttpResponse, web};
use bulkhead::http;
use bulkhead::http::front::{ConnectionLimits, Front, Times};
use rustix::net::{AddressFamily, SocketType};

struct Served {
    address: SocketAddr,
    handle: actix_web::dev::ServerHandle,
}

async fn slow() -> HttpResponse {
    tokio::time::sleep(Duration::from_secs(3)).await;
    HttpResponse::Ok().body("slow")
}

async fn echo(body: web::Bytes) -> HttpResponse {
    HttpResponse::Ok().body(body)
}

async fn large() -> HttpResponse {
    let chunks =
        futures_util::stream::repeat_with(|| Ok::<_, std::io::Error>(web::Bytes::from(vec![7; 65_536])));
    HttpResponse::Ok().streaming(chunks)
}

fn times() -> Times {
    Times {
        head: Duration::from_secs(2),
        idle: Duration::from_secs(2),
        body: Duration::from_secs(2),
        grace: Duration::from_secs(1),
        rate: 4096,
        drain: Duration::from_millis(500),
    }
}

fn serve(bounds: ConnectionLimits, times: Times) -> Served {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut front = Front::new("test", listener, 1, bounds);
    front.times = times;
    let server = front
        .serve(|| {
            App::new()
                .wrap(from_fn(http::outermost))
                .route("/slow", web::get().to(slow))
                .route("/echo", web::post().to(echo))
                .route("/v2/blob", web::put().to(echo))
                .route("/large", web::get().to(large))
        })
        .unwrap();
    let handle = server.handle();
    tokio::spawn(server);
    Served { address, handle }
}

const WIDE: ConnectionLimits = ConnectionLimits { all: 1000, per_source: 1000 };

/// Connects from a given loopback address.
fn connect_from(source: [u8; 4], to: SocketAddr) -> TcpStream {
    let socket = rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let own = SocketAddr::from((source, 0));
    rustix::net::bind(&socket, &own).unwrap();
    rustix::net::connect(&socket, &to).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

fn connect(to: SocketAddr) -> TcpStream {
    connect_from([127, 0, 0, 1], to)
}

fn all_of(mut stream: &TcpStream) -> String {
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

/// Returns the status of an answer, and checks the headers that every answer must have.
fn status_with_headers(answer: &str) -> u16 {
    let head = answer.split("\r\n\r\n").next().unwrap().to_ascii_lowercase();
    for name in ["x-request-id", "content-security-policy", "x-content-type-options", "referrer-policy"] {
        assert!(head.contains(&format!("\r\n{name}: ")), "no {name} in {answer:?}");
    }
    head.split(' ').nth(1).unwrap_or_else(|| panic!("{answer:?}")).parse().unwrap()
}

fn ask(to: SocketAddr, text: &[u8]) -> String {
    let mut stream = connect(to);
    stream.write_all(text).unwrap();
    all_of(&stream)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_servers_own_answers_bear_the_headers_of_every_answer() {
    let served = serve(WIDE, times());
    let to = served.address;
    blocking(move || {
        for nonsense in [
            "\0\x01\x02 nonsense\r\n\r\n",
            "GET / HTTP/9.9\r\n\r\n",
            "GET / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\nhost: x\r\nbroken header\r\n\r\n",
            "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nabcd",
            "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
            "POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            "CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n",
        ] {
            assert_eq!(status_with_headers(&ask(to, nonsense.as_bytes())), 400, "{nonsense:?}");
        }
        let large = format!("GET / HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "a".repeat(115_000));
        assert_eq!(status_with_headers(&ask(to, large.as_bytes())), 431);
        let endless = format!("GET / HTTP/1.1\r\nhost: x\r\nx: {}", "a".repeat(40_000));
        assert_eq!(status_with_headers(&ask(to, endless.as_bytes())), 431);
        let many = format!("GET / HTTP/1.1\r\nhost: x\r\n{}\r\n", "a: b\r\n".repeat(2000));
        assert_eq!(status_with_headers(&ask(to, many.as_bytes())), 431);
        // Nothing, half a head, half a body: each ends within its time.
        for text in
            ["", "GET / HTTP/1.1\r\nhost", "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nabc"]
        {
            let begun = Instant::now();
            assert_eq!(status_with_headers(&ask(to, text.as_bytes())), 408, "{text:?}");
            assert!(begun.elapsed() < Duration::from_secs(5));
        }
        // Also after another request on the same connection.
        let good = "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nok";
        for (then, status) in
            [("\0\r\n\r\n".to_owned(), 400), (endless.clone(), 431), ("GET /".to_owned(), 408)]
        {
            let answers = ask(to, format!("{good}{then}").as_bytes());
            let (first, second) = answers.split_once("\r\n\r\nok").unwrap();
            assert_eq!(status_with_headers(first), 200);
            assert_eq!(status_with_headers(second), status, "{answers:?}");
        }
    })
    .await;
    served.handle.stop(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_one_after_the_other_ahead_and_in_pieces_are_answered() {
    let served = serve(WIDE, times());
    let to = served.address;
    blocking(move || {
        let piped = "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\noneGET /nope HTTP/1.1\r\nhost: x\r\n\r\nPOST /echo \
                     HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\ntwo\r\n0\r\n\r\nPOST /echo HTTP/1.1\r\nhost: x\r\n\
                     connection: close\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\nthree";
        for piece in [piped.len(), 1, 7, 64] {
            let mut stream = connect(to);
            stream.set_nodelay(true).unwrap();
            for part in piped.as_bytes().chunks(piece) {
                stream.write_all(part).unwrap();
            }
            let answers = all_of(&stream);
            let at = |text: &str| answers.find(text).unwrap_or_else(|| panic!("{text}: {answers}"));
            assert!(at("one") < at("404 Not Found"), "{answers}");
            assert!(at("404 Not Found") < at("two") && at("two") < at("100 Continue"), "{answers}");
            assert!(answers.ends_with("three"), "{answers}");
            assert_eq!(answers.matches("HTTP/1.1 200").count(), 3, "{answers}");
        }
        // A body as large as a registry upload returns byte by byte.
        let body: String = (0..200_000).map(|n| char::from(b'a' + u8::try_from(n % 26).unwrap())).collect();
        let head = format!("PUT /v2/blob HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        let answer = ask(to, format!("{head}{body}").as_bytes());
        assert!(answer.ends_with(&body), "{}", &answer[..200]);
    })
    .await;
    served.handle.stop(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_of_silent_sources_locks_no_one_out() {
    let served = serve(
        ConnectionLimits { all: 200, per_source: 50 },
        Times { head: Duration::from_secs(60), ..times() },
    );
    let to = served.address;
    blocking(move || {
        let mut crowd = Vec::new();
        for n in 0..3000_u16 {
            let [high, low] = n.to_be_bytes();
            let mut stream = connect_from([127, 7, high, low], to);
            // Some send nothing, others half a head or half a body.
            let said = [
                &b""[..],
                b"GET / HTTP/1.1\r\nhost: x\r\nx: y",
                b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\na",
            ];
            let _ = stream.write_all(said[usize::from(n % 3)]);
            crowd.push(stream);
            if n % 100 == 99 {
                let begun = Instant::now();
                let answer = ask(to, b"GET /nope HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
                assert_eq!(status_with_headers(&answer), 404);
                assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
            }
        }
        // One source has its own limit, and its own silent connections are closed first.
        let own: Vec<TcpStream> = (0..80).map(|_| connect_from([127, 9, 9, 9], to)).collect();
        assert_eq!(
            status_with_headers(&ask(to, b"GET /nope HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")),
            404
        );
        drop((crowd, own));
    })
    .await;
    served.handle.stop(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_with_all_its_requests_under_way_is_told_so() {
    let served = serve(ConnectionLimits { all: 20, per_source: 4 }, times());
    let to = served.address;
    blocking(move || {
        let busy: Vec<TcpStream> = (0..4)
            .map(|_| {
                let mut stream = connect(to);
                stream.write_all(b"GET /slow HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
                stream
            })
            .collect();
        std::thread::sleep(Duration::from_millis(500));
        let answer = ask(to, b"GET /nope HTTP/1.1\r\nhost: x\r\n\r\n");
        assert_eq!(status_with_headers(&answer), 429);
        assert!(answer.contains("retry-after: 1"), "{answer}");
        // Another source is served, and the request in progress gets its answer.
        let mut other = connect_from([127, 0, 0, 2], to);
        other.write_all(b"GET /nope HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        assert_eq!(status_with_headers(&all_of(&other)), 404);
        for stream in &busy {
            assert_eq!(status_with_headers(&all_of(stream)), 200);
        }
    })
    .await;
    served.handle.stop(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_bodies_and_slow_readers_end() {
    let served = serve(WIDE, Times { body: Duration::from_secs(60), ..times() });
    let to = served.address;
    blocking(move || {
        // An occasional byte does not keep a body alive.
        let mut drip = connect(to);
        drip.write_all(b"PUT /v2/blob HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n").unwrap();
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(8) && drip.write_all(b"x").is_ok() {
            std::thread::sleep(Duration::from_millis(200));
        }
        assert!(begun.elapsed() < Duration::from_secs(7), "{:?}", begun.elapsed());
        // A client that does not read is cut off: the answer ends early.
        let mut lazy = connect(to);
        lazy.write_all(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        std::thread::sleep(Duration::from_secs(4));
        let mut sink = vec![0; 1 << 20];
        let begun = Instant::now();
        while lazy.read(&mut sink).is_ok_and(|n| n > 0) {
            assert!(begun.elapsed() < Duration::from_secs(5), "the answer continues");
        }
    })
    .await;
    served.handle.stop(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_cost_little() {
    fn resident() -> u64 {
        let text = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
    let served = serve(
        ConnectionLimits { all: 5000, per_source: 5000 },
        Times { head: Duration::from_secs(60), ..times() },
    );
    let to = served.address;
    blocking(move || {
        let before = resident();
        let crowd: Vec<TcpStream> = (0..3000_u16)
            .map(|n| {
                let [high, low] = n.to_be_bytes();
                connect_from([127, 8, high, low], to)
            })
            .collect();
        assert_eq!(
            status_with_headers(&ask(to, b"GET /nope HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")),
            404
        );
        let each = resident().saturating_sub(before) * 1024 / 3000;
        println!("{each} bytes for each silent connection");
        assert!(each < 12_000, "{each} bytes each");
        drop(crowd);
    })
    .await;
    served.handle.stop(false).await;
}
