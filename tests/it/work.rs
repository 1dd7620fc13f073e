//! Work for reconcilers: claimed by one worker at a time, taken over from dead workers; late results are
//! dropped.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bulkhead::ids::TenantId;
use bulkhead::reconcile::{self, Failure, Lease, Outcome, Reconciler, Waker};
use bulkhead::telemetry::Metrics;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

type Step = Box<dyn Fn(Lease) -> (Duration, Result<Outcome, Failure>) + Send + Sync>;

/// Records which objects were reconciled, and acts as the test says.
struct Scribe {
    step: Step,
    now: Mutex<BTreeSet<i64>>,
    doubles: AtomicI64,
    done: Mutex<Vec<Lease>>,
    reports: Mutex<Vec<(i64, Option<String>)>>,
}

impl Scribe {
    fn new(
        step: impl Fn(Lease) -> (Duration, Result<Outcome, Failure>) + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            step: Box::new(step),
            now: Mutex::default(),
            doubles: AtomicI64::new(0),
            done: Mutex::default(),
            reports: Mutex::default(),
        })
    }
    fn times(&self, object: i64) -> usize {
        self.done.lock().unwrap().iter().filter(|lease| lease.object_id == object).count()
    }
    fn reports_of(&self, object: i64) -> Vec<Option<String>> {
        let reports = self.reports.lock().unwrap();
        reports.iter().filter(|report| report.0 == object).map(|report| report.1.clone()).collect()
    }
}

#[async_trait::async_trait]
impl Reconciler for Scribe {
    fn kind(&self) -> &'static str {
        "note"
    }
    async fn reconcile(&self, lease: Lease) -> Result<Outcome, Failure> {
        if !self.now.lock().unwrap().insert(lease.object_id) {
            self.doubles.fetch_add(1, Ordering::SeqCst);
        }
        let (takes, result) = (self.step)(lease);
        tokio::time::sleep(takes).await;
        self.now.lock().unwrap().remove(&lease.object_id);
        self.done.lock().unwrap().push(lease);
        result
    }
    async fn report(&self, object_id: i64, problem: Option<&str>) -> Result<(), sqlx::Error> {
        self.reports.lock().unwrap().push((object_id, problem.map(str::to_owned)));
        Ok(())
    }
}

struct Runner {
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

fn run(pool: &PgPool, scribe: &Arc<Scribe>) -> Runner {
    let stop = CancellationToken::new();
    let reconcilers: Vec<Arc<dyn Reconciler>> = vec![Arc::clone(scribe) as _];
    let metrics = actix_web::web::Data::new(Metrics::default());
    let task =
        tokio::spawn(reconcile::run(pool.clone(), reconcilers, Waker::default(), metrics, stop.clone()));
    Runner { stop, task }
}

impl Runner {
    async fn end(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

async fn tenant(pool: &PgPool, name: &str) -> TenantId {
    let id = sqlx::query_scalar("INSERT INTO tenant (name, display_name) VALUES ($1, $1) RETURNING id")
        .bind(name)
        .fetch_one(pool)
        .await
        .unwrap();
    TenantId(id)
}

async fn enqueue(pool: &PgPool, object: i64, tenant: TenantId) {
    let mut conn = pool.acquire().await.unwrap();
    reconcile::enqueue(&mut conn, "note", object, tenant).await.unwrap();
}

async fn until(what: &str, good: impl Fn() -> bool) {
    for _ in 0..200 {
        if good() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("not seen: {what}");
}

async fn due_now(pool: &PgPool) {
    sqlx::query("UPDATE work SET due_at = now() - interval '1 second'").execute(pool).await.unwrap();
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn two_replicas_share_the_work_and_never_an_object(pool: PgPool) {
    let (small, large) = (tenant(&pool, "small").await, tenant(&pool, "large").await);
    for object in 0..120 {
        enqueue(&pool, object, large).await;
    }
    enqueue(&pool, 1000, small).await;
    let scribe = Scribe::new(|_| (Duration::from_millis(20), Ok(Outcome::Settled)));
    let (one, two) = (run(&pool, &scribe), run(&pool, &scribe));
    until("all done", || scribe.done.lock().unwrap().len() >= 121).await;
    one.end().await;
    two.end().await;
    assert_eq!(scribe.doubles.load(Ordering::SeqCst), 0);
    let done = scribe.done.lock().unwrap().clone();
    assert_eq!(done.len(), 121, "each once");
    // A tenant with much work does not delay another tenant.
    let place = done.iter().position(|lease| lease.object_id == 1000).unwrap();
    assert!(place < 20, "the small tenant came {place}th");
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_change_during_the_work_is_not_missed(pool: PgPool) {
    let tenant = tenant(&pool, "acme").await;
    enqueue(&pool, 1, tenant).await;
    let scribe = Scribe::new(|_| (Duration::from_millis(400), Ok(Outcome::Settled)));
    let runner = run(&pool, &scribe);
    until("it began", || !scribe.now.lock().unwrap().is_empty()).await;
    enqueue(&pool, 1, tenant).await;
    until("done twice", || scribe.times(1) == 2).await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(scribe.times(1), 2, "and not again");
    runner.end().await;
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn the_work_of_the_dead_is_taken_over_and_their_result_dropped(pool: PgPool) {
    let tenant = tenant(&pool, "acme").await;
    enqueue(&pool, 1, tenant).await;
    // The first worker stalls, like a process that was paused and continues later.
    let scribe = Scribe::new(|lease| {
        let slow = Duration::from_millis(if lease.epoch == 1 { 2_500 } else { 50 });
        let result =
            if lease.epoch == 1 { Err(Failure::Permanent("too late".into())) } else { Ok(Outcome::Settled) };
        (slow, result)
    });
    let first = run(&pool, &scribe);
    until("the first began", || !scribe.now.lock().unwrap().is_empty()).await;
    due_now(&pool).await;
    let second = run(&pool, &scribe);
    until("both ended", || scribe.times(1) == 2).await;
    first.end().await;
    second.end().await;
    let (epoch, parked): (i64, bool) =
        sqlx::query_as("SELECT epoch, parked_at IS NOT NULL FROM work").fetch_one(&pool).await.unwrap();
    assert_eq!((epoch, parked), (2, false), "the late result changed nothing");
    assert_eq!(scribe.reports_of(1), [None]);
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn failures_are_tried_again_or_parked_until_something_changes(pool: PgPool) {
    let tenant = tenant(&pool, "acme").await;
    enqueue(&pool, 1, tenant).await;
    enqueue(&pool, 2, tenant).await;
    enqueue(&pool, 3, tenant).await;
    let scribe = Scribe::new(|lease| {
        let result = match (lease.object_id, lease.attempt) {
            (1, 1) => Err(Failure::Transient("away".into())),
            (2, _) => Err(Failure::Permanent("never".into())),
            (3, _) => Ok(Outcome::Gone),
            _ => Ok(Outcome::Settled),
        };
        (Duration::ZERO, result)
    });
    let runner = run(&pool, &scribe);
    until("tried again", || scribe.times(1) == 2).await;
    assert_eq!(scribe.reports_of(1), [Some("away".into()), None]);
    assert_eq!(scribe.times(2), 1);
    due_now(&pool).await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(scribe.times(2), 1, "a parked object stays parked");
    enqueue(&pool, 2, tenant).await;
    until("and wakes with a change", || scribe.times(2) == 2).await;
    let left: i64 =
        sqlx::query_scalar("SELECT count(*) FROM work WHERE object_id = 3").fetch_one(&pool).await.unwrap();
    assert_eq!(left, 0, "a deleted object has no row");
    runner.end().await;
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn slow_work_of_many_tenants_leaves_slots_for_others(pool: PgPool) {
    // Slow pulls: for objects below 1000.
    let scribe = Scribe::new(|lease| {
        let takes = if lease.object_id < 1000 { Duration::from_secs(9) } else { Duration::ZERO };
        (takes, Ok(Outcome::Settled))
    });
    let mut slow = Vec::new();
    for n in 0..6_i64 {
        let tenant = tenant(&pool, &format!("slow{n}")).await;
        for object in 0..10 {
            enqueue(&pool, n * 100 + object, tenant).await;
        }
        slow.push(n);
    }
    let victim = tenant(&pool, "victim").await;
    let runner = run(&pool, &scribe);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    // At any time of arrival: while all work is new, and when all slow work is stuck.
    for round in 0..3 {
        let asked = std::time::Instant::now();
        enqueue(&pool, 1000 + round, victim).await;
        until("the victim's work", || scribe.times(1000 + round) == 1).await;
        assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
        // No tenant exceeds its maximum of concurrent work.
        let now = scribe.now.lock().unwrap().clone();
        for n in &slow {
            let own = now.range(n * 100..n * 100 + 100).count();
            assert!(own <= 4, "{own} of one tenant");
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    // The slow ones left the slots: more than sixteen are in progress.
    assert!(scribe.now.lock().unwrap().len() > 16);
    runner.end().await;
    assert_eq!(scribe.doubles.load(Ordering::SeqCst), 0);
}
