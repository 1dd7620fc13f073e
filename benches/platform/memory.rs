//! Resident memory of `bulkhead serve`: idle with 1,000 tenants, and during the push of a 2 GiB layer.

use std::fs;
use std::io::Write as _;
use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::Row;
use crate::support::{Image, Machine, run};

#[expect(clippy::cast_precision_loss, reason = "megabytes for people")]
fn megabytes(kilobytes: u64) -> f64 {
    kilobytes as f64 / 1024.0
}

pub(crate) async fn idle() -> Row {
    let machine = Machine::start().await;
    let options = PgConnectOptions::new_without_pgpass()
        .socket(machine.data.join("run/postgres"))
        .username("postgres")
        .database("bulkhead");
    let pool = PgPoolOptions::new().connect_with(options).await.unwrap();
    // A thousand settled tenants: their rows, with no work left on the engine.
    for statement in [
        "INSERT INTO tenant (name, display_name, observed_generation) SELECT 'idle-' || n, 'x', 1 FROM generate_series(1, 1000) n",
        "INSERT INTO quota (tenant_id, resource) SELECT id, resource FROM tenant, quota_default WHERE resource NOT LIKE 'platform%'",
        "INSERT INTO uid_range (tenant_id, pool_start, pool_end, size, block_size) SELECT id, 1000000000, 2147483648, 65536, 1024 FROM tenant",
        "INSERT INTO network (tenant_id, limit_) SELECT id, 100000 FROM tenant",
    ] {
        sqlx::query(statement).execute(&pool).await.unwrap();
    }
    pool.close().await;
    machine.kill("serve");
    tokio::time::sleep(Duration::from_secs(2)).await;
    let list = machine.get("/api/v1/tenants?limit=200").await;
    assert_eq!(list["items"].as_array().unwrap().len(), 200);
    tokio::time::sleep(Duration::from_secs(20)).await;
    let mut values: Vec<u64> = Vec::new();
    for _ in 0..5 {
        values.push(machine.memory("VmRSS:"));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    values.sort_unstable();
    let now = megabytes(values[2]);
    Row {
        what: "resident memory of serve, idle, 1,000 tenants, MB",
        ours: format!("{now:.1}"),
        peer: "limit 25".into(),
        result: format!("{:.2} of the limit", now / 25.0),
        goal: "25",
    }
}

pub(crate) async fn push() -> Row {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    machine.push(&robot, "acme/small:1", &["/bin/busybox", "sleep", "1"]);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = machine.memory("VmRSS:");
    let dir = tempfile::tempdir().unwrap();
    image_of(dir.path(), 2048);
    let (begun, machine) = (Instant::now(), std::sync::Arc::new(machine));
    let (own, place) = (std::sync::Arc::clone(&machine), dir.path().to_owned());
    let pushing = tokio::task::spawn_blocking(move || own.copy(&robot, &place, "acme/big:1"));
    let mut most = before;
    while !pushing.is_finished() {
        most = most.max(machine.memory("VmRSS:"));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (good, text) = pushing.await.unwrap();
    assert!(good, "{text}");
    let seconds = begun.elapsed().as_secs_f64();
    let peak = machine.memory("VmHWM:").max(most);
    Row {
        what: "resident memory of serve during a push of 2 GiB, MB",
        ours: format!(
            "{:.1} before, {:.1} maximum ({:.0} MiB/s)",
            megabytes(before),
            megabytes(peak),
            2048.0 / seconds
        ),
        peer: "flat".into(),
        result: format!("{:+.1} MB", megabytes(peak) - megabytes(before)),
        goal: "flat",
    }
}

/// Writes an image with one incompressible layer of this many MiB.
fn image_of(dir: &std::path::Path, mebibytes: u64) {
    let blobs = dir.join("image/blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let (plain, size) = (dir.join("layer"), mebibytes << 20);
    let mut header = tar::Header::new_ustar();
    header.set_path("data").unwrap();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_cksum();
    let mut file = std::io::BufWriter::with_capacity(1 << 20, fs::File::create(&plain).unwrap());
    file.write_all(header.as_bytes()).unwrap();
    let mut block = vec![0_u8; 1 << 20];
    for n in 0..mebibytes {
        for (at, chunk) in block.chunks_exact_mut(8).enumerate() {
            let mix = (n << 20 | at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
            chunk.copy_from_slice(&mix.wrapping_mul(0xbf58_476d_1ce4_e5b9).to_le_bytes());
        }
        file.write_all(&block).unwrap();
    }
    file.write_all(&[0; 1024]).unwrap();
    drop(file);
    let (_, sum) = run("sha256sum", &[&plain.display().to_string()]);
    let digest = sum.split(' ').next().unwrap().to_owned();
    let length = fs::metadata(&plain).unwrap().len();
    fs::rename(&plain, blobs.join(&digest)).unwrap();
    let image = Image { user: "1000", ..Image::of(&["/bin/true"]) };
    image.write(dir, &format!("sha256:{digest}").parse().unwrap(), length);
}
