//! Tells systemd that a process is ready (`Type=notify`, sd_notify(3)), so that dependent units start
//! afterwards. Without `NOTIFY_SOCKET`, as under `up`, it does nothing.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Reports that this process is ready. A failure is only logged: the process works anyway.
pub fn ready() {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(socket.as_bytes(), "READY=1") {
        tracing::warn!(%error, "systemd was not notified that this process is ready");
    }
}

fn send(socket: &[u8], state: &str) -> io::Result<()> {
    let address = match socket.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None if socket.starts_with(b"/") => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(socket))?,
        None => return Err(io::Error::other("NOTIFY_SOCKET is neither a path nor an abstract name")),
    };
    let datagram = UnixDatagram::unbound()?;
    datagram.set_write_timeout(Some(std::time::Duration::from_secs(2)))?;
    datagram.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        socket.set_read_timeout(Some(std::time::Duration::from_secs(2))).unwrap();
        let mut buffer = [0; 64];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    #[test]
    fn readiness_arrives_at_a_path_and_at_an_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str().as_bytes(), "READY=1").unwrap();
        assert_eq!(received(&socket), "READY=1");
        let name = format!("bulkhead-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        send(format!("@{name}").as_bytes(), "READY=1").unwrap();
        assert_eq!(received(&socket), "READY=1");
        for wrong in [&b"relative"[..], b"", b"/nowhere/at/all"] {
            assert!(send(wrong, "READY=1").is_err());
        }
    }
}
