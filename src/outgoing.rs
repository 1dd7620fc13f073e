//! Outgoing HTTP: one builder for every client. It follows no redirects, ignores proxies of the environment,
//! and uses rustls with ring.

/// Returns a builder with the settings that all clients of the platform share.
pub fn client() -> reqwest::ClientBuilder {
    // A second installation returns an error and changes nothing.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).no_proxy()
}
