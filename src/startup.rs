//! Assembles the parts of `serve`: pool, driver, reconcilers, listeners.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use actix_web::middleware::from_fn;
use actix_web::{App, HttpResponse, web};
use sqlx::{Connection, PgConnection, PgPool};
use tokio_util::sync::CancellationToken;

use crate::access::denials::Denials;
use crate::access::oidc::Providers;
use crate::access::passwords::Passwords;
use crate::access::sessions::Desk;
use crate::access::throttle::Throttle;
use crate::access::turns::Turns;
use crate::apps::actions::Apps;
use crate::apps::follow::follow;
use crate::apps::reconcile::{AppReconciler, AppsOfTenant};
use crate::apps::sight::Sight;
use crate::audit::heads::Heads;
use crate::config::Config;
use crate::db::{self, Login};
use crate::driver::Driver;
use crate::driver::agent::client::AgentClient;
use crate::error::Error;
use crate::http::front::{self, ConnectionLimits, Front};
use crate::http::{self, OwnAddress, Proxies};
use crate::keys::{KeyPurpose, Keys};
use crate::networks::connections::Network;
use crate::networks::probe::ProbeReconciler;
use crate::networks::reconcile::{ConnectionsOfTenant, NetworkReconciler};
use crate::networks::rollouts::advance::RolloutReconciler;
use crate::reconcile::{self, Reconciler, Waker};
use crate::registries::collect::watch;
use crate::registries::front::{Door, FrontDoor, ImageHolders};
use crate::registries::reconcile::{ImagesOfTenant, RobotsOfTenant, sweep};
use crate::registries::{Distribution, Holders, PullSecrets, SigningKey};
use crate::telemetry::Metrics;
use crate::tenants::Belongings;
use crate::tenants::reconcile::TenantReconciler;
use crate::{audit, quotas, readiness, routes, uid_ranges};

/// Connection limits of the engine's listener. Only this machine connects.
const PULLS: ConnectionLimits = ConnectionLimits { all: 512, per_source: 512 };
/// Connection limits of the metrics listener.
const METRICS: ConnectionLimits = ConnectionLimits { all: 64, per_source: 64 };

/// The parts that handlers share.
#[derive(Clone)]
pub struct Platform {
    /// Configuration.
    pub config: web::Data<Config>,
    /// Database pool of requests.
    pub pool: PgPool,
    /// Database pool of reconcilers.
    pub work: PgPool,
    /// Sign-in.
    pub desk: Desk,
    /// The driver of workloads.
    pub driver: Arc<dyn Driver>,
    /// The registry.
    pub registry: Distribution,
    /// Key that signs the registry's tokens.
    pub key: SigningKey,
    /// Rate limits of requests.
    pub turns: Turns,
    /// Wakes the runner.
    pub waker: Waker,
    /// Counters.
    pub metrics: web::Data<Metrics>,
    /// How recent the view of the running apps is.
    pub sight: Sight,
}

impl Platform {
    /// Builds the parts; sends no request yet.
    pub fn build(config: Config, driver: Arc<dyn Driver>, pool: PgPool, work: PgPool) -> Result<Self, Error> {
        let pem = fs::read_to_string(&config.registry.signing_key).map_err(|error| {
            Error::internal(format!("{}: {error}", config.registry.signing_key.display()))
        })?;
        let key = SigningKey::from_pem(&pem)?;
        let registry = Distribution::new(pool.clone(), &config.registry.url, key.clone())?
            .with_collector(config.registry.collector.as_deref(), work.clone())
            .on_disk(config.registry.disk.clone());
        let keys = Keys::load(&config.access.key)?;
        let desk = Desk {
            throttle: Throttle::new(pool.clone(), &keys),
            passwords: Passwords::new()?,
            denials: Denials::default(),
            providers: Providers::load(&config.access.providers)?,
            pool: pool.clone(),
            keys,
        };
        Ok(Self {
            turns: Turns::new(&config.limits, config.database.connections),
            config: web::Data::new(config),
            desk,
            pool,
            work,
            driver,
            registry,
            key,
            waker: Waker::default(),
            metrics: web::Data::new(Metrics::default()),
            sight: Sight::default(),
        })
    }

    /// Returns the reconcilers.
    #[must_use]
    pub fn reconcilers(&self) -> Vec<Arc<dyn Reconciler>> {
        let (pool, pools) = (self.work.clone(), self.config.pools.clone());
        let network = self.network(pool.clone());
        let belongings: Vec<Arc<dyn Belongings>> = vec![
            Arc::new(RobotsOfTenant { pool: pool.clone() }),
            Arc::new(AppsOfTenant { pool: pool.clone() }),
            Arc::new(ConnectionsOfTenant { pool: pool.clone() }),
            Arc::new(ImagesOfTenant { pool: pool.clone(), registry: self.registry.clone() }),
        ];
        vec![
            Arc::new(TenantReconciler {
                pool: pool.clone(),
                pools: pools.clone(),
                driver: Arc::clone(&self.driver),
                belongings,
            }),
            Arc::new(AppReconciler {
                pool,
                pools,
                driver: Arc::clone(&self.driver),
                registry: self.registry.clone(),
                secrets: PullSecrets(self.key.clone()),
                connections: Arc::new(network.clone()),
            }),
            Arc::new(NetworkReconciler(network.clone())),
            Arc::new(RolloutReconciler(network.clone())),
            Arc::new(ProbeReconciler(network)),
        ]
    }

    fn network(&self, pool: PgPool) -> Network {
        Network { pool, pools: self.config.pools.clone(), driver: Arc::clone(&self.driver) }
    }

    /// Adds the parts to a listener.
    pub fn configure(&self, door: Door, cfg: &mut web::ServiceConfig) {
        let own = OwnAddress {
            external: self.config.server.external_url.clone(),
            proxies: Proxies::of(&self.config.server),
        };
        let engine = door != Door::Tenants;
        let holders: Arc<dyn Holders> = Arc::new(AppsOfTenant { pool: self.pool.clone() });
        let front = FrontDoor {
            pool: self.pool.clone(),
            key: self.key.clone(),
            registry: self.registry.clone(),
            own: own.clone(),
            door,
            holders: ImageHolders(Arc::clone(&holders)),
            denials: self.desk.denials.clone(),
            turns: self.turns.clone(),
        };
        cfg.app_data(web::PayloadConfig::new(http::BODY_LIMIT))
            .app_data(web::FormConfig::default().limit(4096))
            .app_data(web::Data::new(front))
            .app_data(web::Data::new(own))
            .app_data(web::Data::new(self.turns.clone()))
            .app_data(self.metrics.clone());
        if engine {
            cfg.configure(routes::registry);
            return;
        }
        let apps = Apps {
            pool: self.pool.clone(),
            pools: self.config.pools.clone(),
            registry: self.registry.clone(),
            waker: self.waker.clone(),
            connections: Arc::new(self.network(self.pool.clone())),
            sight: self.sight.clone(),
        };
        cfg.app_data(
            web::QueryConfig::default().error_handler(|error, _| {
                Error::Malformed(format!("the query cannot be read: {error}")).into()
            }),
        )
        .app_data(web::Data::new(self.desk.clone()))
        .app_data(web::Data::new(self.desk.keys.clone()))
        .app_data(web::Data::new(self.desk.denials.clone()))
        .app_data(self.config.clone())
        .app_data(web::Data::new(self.pool.clone()))
        .app_data(web::Data::new(self.waker.clone()))
        .app_data(web::Data::new(self.sight.clone()))
        .app_data(web::Data::new(self.registry.clone()))
        .app_data(web::Data::<dyn Driver>::from(Arc::clone(&self.driver)))
        .app_data(web::Data::<dyn Holders>::from(holders))
        .app_data(web::Data::new(apps))
        .configure(routes::configure);
    }
}

async fn metrics(metrics: web::Data<Metrics>, sight: web::Data<Sight>) -> HttpResponse {
    HttpResponse::Ok().content_type("text/plain; version=0.0.4").body(metrics.render() + &sight.render())
}

/// Migrates the database to this version and claims it for this installation. Connects as a role that may
/// create roles.
pub async fn migrate(config: &Config) -> Result<(), Error> {
    let options = db::options(&config.database, Login::Admin).map_err(Error::internal)?;
    let mut conn = PgConnection::connect_with(&options).await.map_err(Error::internal)?;
    db::migrate(&mut conn, config).await?;
    conn.close().await?;
    Ok(())
}

/// Runs `serve` until it must stop.
pub async fn serve(config: Config, stop: impl Future<Output = ()>) -> Result<(), Error> {
    let connections = config.database.connections;
    let pool = db::pool(db::options(&config.database, Login::Runtime).map_err(Error::internal)?, connections);
    let work = db::options(&config.database, Login::Reconciler).map_err(Error::internal)?;
    let work = db::pool(work, (connections / 2).max(4));
    db::check_schema(&pool).await?;
    for pool in [&pool, &work] {
        db::check_role(pool).await?;
    }
    let mut conn = work.acquire().await?;
    db::claim_installation(&mut conn, &config.installation, &config.pools).await?;
    drop(conn);
    quotas::declare(&mut *pool.acquire().await?, &config.limits).await?;
    check_ids(&config)?;
    let client = AgentClient::new(config.agent.socket.clone());
    let platform = Platform::build(config, Arc::new(client), pool, work)?;
    run(platform, stop).await
}

/// Compares the pool of ids with the machine: a clash is an error at start.
fn check_ids(config: &Config) -> Result<(), Error> {
    let pool = config.pools.ids();
    let found = uid_ranges::machine::look(std::path::Path::new("/"), pool, Some(&config.installation));
    for warning in found.warnings {
        tracing::warn!(warning, "user ids");
    }
    if found.clashes.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = found.clashes.iter().map(ToString::to_string).collect();
    Err(Error::internal(format!(
        "the pool of user ids is in use outside Bulkhead on this machine: {}. Set pools.uid_start and pools.uid_end to another range, or free these ids",
        list.join("; ")
    )))
}

fn bind(listen: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(listen).map_err(|error| Error::internal(format!("{listen}: {error}")))
}

async fn run(platform: Platform, stop: impl Future<Output = ()>) -> Result<(), Error> {
    let halt = CancellationToken::new();
    let mut tasks = vec![
        tokio::spawn(reconcile::run(
            platform.work.clone(),
            platform.reconcilers(),
            platform.waker.clone(),
            platform.metrics.clone(),
            halt.clone(),
        )),
        tokio::spawn(follow(
            platform.work.clone(),
            Arc::clone(&platform.driver),
            platform.waker.clone(),
            platform.sight.clone(),
            halt.clone(),
        )),
        tokio::spawn(sweep(platform.work.clone(), platform.registry.clone(), halt.clone())),
        tokio::spawn(watch(
            platform.work.clone(),
            platform.registry.clone(),
            platform.metrics.clone(),
            halt.clone(),
        )),
        tokio::spawn(housekeeping(platform.work.clone(), platform.config.clone(), halt.clone())),
        tokio::spawn(platform.desk.denials.clone().run(platform.work.clone(), halt.clone())),
        tokio::spawn(audit::seal::run(
            platform.work.clone(),
            platform.desk.keys.of(KeyPurpose::Audit),
            Heads::in_file(platform.config.access.audit_heads.clone()),
            halt.clone(),
        )),
        tokio::spawn(watch_ids(platform.config.clone(), halt.clone())),
    ];
    let server = platform.config.server.clone();
    let tenants = platform.clone();
    let bounds = front::bounds(&platform.config);
    tracing::info!(all = bounds.all, per_source = bounds.per_source, "connections");
    let mut public = Front::new("front", bind(server.listen)?, server.workers, bounds);
    public.tls = tls(&platform.config)?;
    public.proxies = Proxies::of(&server);
    let public = public.serve(move || {
        let platform = tenants.clone();
        App::new().wrap(from_fn(http::outermost)).configure(|cfg| platform.configure(Door::Tenants, cfg))
    });
    let public = public.map_err(Error::internal)?;
    let engine = platform.clone();
    let pull = Front::new("pull", bind(server.pull_listen)?, 1, PULLS);
    let pull = pull.serve(move || {
        let platform = engine.clone();
        let address = platform.config.server.pull_listen.to_string();
        App::new()
            .wrap(from_fn(http::outermost))
            .configure(|cfg| platform.configure(Door::Engine(address), cfg))
    });
    let pull = pull.map_err(Error::internal)?;
    let mut handles = Vec::new();
    handles.push(public.handle());
    handles.push(pull.handle());
    tasks.push(tokio::spawn(async { drop(public.await) }));
    tasks.push(tokio::spawn(async { drop(pull.await) }));
    if let Some(listen) = server.metrics_listen {
        let counters = platform.metrics.clone();
        let sight = web::Data::new(platform.sight.clone());
        let own = Front::new("metrics", bind(listen)?, 1, METRICS).serve(move || {
            App::new()
                .wrap(from_fn(http::outermost))
                .app_data(counters.clone())
                .app_data(sight.clone())
                .route("/metrics", web::get().to(metrics))
        });
        let own = own.map_err(Error::internal)?;
        handles.push(own.handle());
        tasks.push(tokio::spawn(async { drop(own.await) }));
    }
    tracing::info!(listen = %server.listen, "ready");
    readiness::ready();
    stop.await;
    tracing::info!("stopping: finishing the requests in progress");
    halt.cancel();
    futures_util::future::join_all(handles.iter().map(|handle| handle.stop(true))).await;
    for task in tasks {
        let _ = tokio::time::timeout(Duration::from_secs(15), task).await;
    }
    platform.pool.close().await;
    platform.work.close().await;
    Ok(())
}

/// Creates the coming months of the audit log and removes expired rows, at the start and once an hour.
async fn housekeeping(pool: PgPool, config: web::Data<Config>, stop: CancellationToken) {
    loop {
        for outcome in [
            audit::prepare_months(&pool).await,
            audit::retire_months(&pool, config.access.audit_months).await,
            crate::access::prune(&pool).await,
            crate::apps::prune(&pool).await,
            crate::networks::prune(&pool).await,
            quotas::prune(&pool).await,
        ] {
            if let Err(error) = outcome {
                tracing::warn!(error = error.for_log(), "housekeeping failed; it is retried later");
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(Duration::from_secs(3600)) => {}
        }
    }
}

/// Compares the pool of ids with the machine every ten minutes; a clash raises an alarm in the log.
async fn watch_ids(config: web::Data<Config>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(Duration::from_secs(600)) => {}
        }
        let found = uid_ranges::machine::look(
            std::path::Path::new("/"),
            config.pools.ids(),
            Some(&config.installation),
        );
        for clash in found.clashes {
            tracing::error!(%clash, "ALARM: a foreign process or account uses ids of the pool");
        }
    }
}

fn tls(config: &Config) -> Result<Option<rustls::ServerConfig>, Error> {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let (Some(certificate), Some(key)) = (&config.server.tls_certificate, &config.server.tls_key) else {
        return Ok(None);
    };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| Error::internal(format!("{}: {error}", certificate.display())))?;
    let key = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| Error::internal(format!("{}: {error}", key.display())))?;
    let tls = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(Error::internal)?;
    Ok(Some(tls))
}
