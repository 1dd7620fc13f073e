//! Runs a function in an instance's network namespace, on a thread of its own that ends with the function.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::thread::JoinHandle;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::oneshot;

/// A function that was started in a namespace.
#[derive(Debug)]
pub struct NamespaceTask<T>(io::Result<JoinHandle<io::Result<T>>>);

fn ended<E>(_: E) -> io::Error {
    io::Error::other("the thread in the network namespace ended early")
}

/// Starts a function in the namespace at a path.
#[must_use]
pub fn begin<T: Send + 'static>(path: &str, what: impl FnOnce() -> T + Send + 'static) -> NamespaceTask<T> {
    let path = path.to_owned();
    NamespaceTask(std::thread::Builder::new().name("namespace".into()).spawn(move || {
        let file = File::open(path)?;
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
        Ok(what())
    }))
}

impl<T> NamespaceTask<T> {
    /// Waits for the result, and blocks this thread meanwhile.
    pub fn wait(self) -> io::Result<T> {
        self.0?.join().map_err(ended)?
    }
}

/// Runs a function in the namespace at a path.
pub async fn within<T: Send + 'static>(
    path: &str,
    what: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (done, wait) = oneshot::channel();
    let begun = begin(path, move || _ = done.send(what()));
    match wait.await {
        Ok(outcome) => Ok(outcome),
        // The thread ended without a result; its own error says why.
        Err(never) => begun.wait().and_then(|()| Err(ended(never))),
    }
}
