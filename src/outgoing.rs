//! Outgoing HTTP: one builder for every client. No redirect is followed, no proxy of the environment
//! is used, and TLS is rustls with ring.

/// A builder with what every client of the platform has in common.
pub fn client() -> reqwest::ClientBuilder {
    // A second installation says so and changes nothing.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).no_proxy()
}
