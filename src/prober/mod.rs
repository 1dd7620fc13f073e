//! Health checks, in a process without any privilege. Only this process may connect from the host into the bridges.
//! Only it reads an app's answer (a status line and at most 4 KiB). An attacker who takes it over through such an
//! answer gains nothing.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;

/// A check requested by the agent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeQuestion {
    /// Address of the instance.
    pub address: Ipv4Addr,
    /// Port of the instance.
    pub port: u16,
    /// Path of a GET; none to check only the connection.
    pub path: Option<String>,
    /// Deadline of the whole check in milliseconds, at most 10,000.
    pub timeout_ms: u32,
}

/// The result of a check.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum ProbeAnswer {
    /// The instance is healthy.
    Well,
    /// The instance is unhealthy, with a short reason. The reason never contains text from the app.
    Ill(String),
    /// The port accepts no connection.
    Closed,
}

/// Maximum number of concurrent checks.
const AT_ONCE: usize = 1024;
/// Maximum number of bytes read from an answer.
const READ: u64 = 4096;

/// Answers checks on a socket until the process ends. Only root and the prober's own user are answered.
pub async fn serve(socket: &Path) -> std::io::Result<()> {
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket)?;
    crate::readiness::ready();
    let own = rustix::process::getuid().as_raw();
    let room = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let (stream, _) = listener.accept().await?;
        let peer = stream.peer_cred()?.uid();
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return Ok(()) };
        if peer != 0 && peer != own {
            continue;
        }
        tokio::spawn(async move {
            let _ = tokio::time::timeout(Duration::from_secs(15), answer(stream)).await;
            drop(permit);
        });
    }
}

async fn answer(stream: UnixStream) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    BufReader::new(read.take(READ)).read_line(&mut line).await?;
    let answer = match serde_json::from_str::<ProbeQuestion>(&line) {
        Ok(question) => check(&question).await,
        Err(_) => ProbeAnswer::Ill("the question cannot be read".into()),
    };
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    write.write_all(&text).await
}

/// Checks an instance.
pub async fn check(question: &ProbeQuestion) -> ProbeAnswer {
    let patience = Duration::from_millis(u64::from(question.timeout_ms.clamp(1, 10_000)));
    match tokio::time::timeout(patience, ask(question)).await {
        Ok(answer) => answer,
        Err(_) => ProbeAnswer::Ill(format!("no answer within {} ms", patience.as_millis())),
    }
}

async fn ask(question: &ProbeQuestion) -> ProbeAnswer {
    let target = SocketAddr::from((question.address, question.port));
    let Ok(mut stream) = TcpStream::connect(target).await else {
        return ProbeAnswer::Closed;
    };
    let Some(path) = &question.path else { return ProbeAnswer::Well };
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {target}\r\nUser-Agent: bulkhead-prober\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    );
    if stream.write_all(request.as_bytes()).await.is_err() {
        return ProbeAnswer::Ill("the connection was closed".into());
    }
    let mut line = Vec::new();
    if BufReader::new(stream.take(READ)).read_until(b'\n', &mut line).await.is_err() {
        return ProbeAnswer::Ill("the connection was closed".into());
    }
    match status(&line) {
        Some(200..=399) => ProbeAnswer::Well,
        Some(code) => ProbeAnswer::Ill(format!("it answers {code}")),
        None => ProbeAnswer::Ill("it does not answer in HTTP".into()),
    }
}

/// Returns the code of a status line.
fn status(line: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(line).ok()?;
    let rest = line.strip_prefix("HTTP/1.")?;
    let code = rest.get(2..5)?;
    (rest.as_bytes().get(1) == Some(&b' ') && code.bytes().all(|b| b.is_ascii_digit()))
        .then(|| code.parse().ok())?
}

/// Requests a check from the prober behind a socket. No answer in time is an error.
pub async fn ask_at(socket: &Path, question: &ProbeQuestion) -> std::io::Result<ProbeAnswer> {
    let patience = Duration::from_millis(u64::from(question.timeout_ms)) + Duration::from_secs(3);
    tokio::time::timeout(patience, converse(socket, question)).await.map_err(std::io::Error::other)?
}

async fn converse(socket: &Path, question: &ProbeQuestion) -> std::io::Result<ProbeAnswer> {
    let stream = UnixStream::connect(socket).await?;
    let (read, mut write) = stream.into_split();
    let mut text = serde_json::to_vec(question)?;
    text.push(b'\n');
    write.write_all(&text).await?;
    let mut line = String::new();
    BufReader::new(read.take(READ)).read_line(&mut line).await?;
    serde_json::from_str(&line).map_err(std::io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_status_line_is_believed() {
        assert_eq!(status(b"HTTP/1.1 200 OK\r\n"), Some(200));
        assert_eq!(status(b"HTTP/1.0 503 \r\n"), Some(503));
        for bad in
            [&b"HTTP/2 200"[..], b"HTTP/1.1 20", b"HTTP/1.1  200", b"200", b"\xff", b"", b"HTTP/1.1 -20 "]
        {
            assert_eq!(status(bad), None);
        }
    }

    #[tokio::test]
    async fn an_answer_without_end_is_cut_off() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            while stream.write_all(&[b'x'; 1024]).await.is_ok() {}
        });
        let question =
            ProbeQuestion { address: Ipv4Addr::LOCALHOST, port, path: Some("/".into()), timeout_ms: 2_000 };
        assert_eq!(check(&question).await, ProbeAnswer::Ill("it does not answer in HTTP".into()));
    }
}
