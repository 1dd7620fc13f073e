//! The private Postgres cluster: created once, reached only over a socket, with peer authentication only.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sqlx::Connection;
use sqlx::postgres::{PgConnectOptions, PgConnection};

use super::{DataFolder, Failed};

/// Returns the folder of Postgres' programs: the newest major version installed.
pub(super) fn programs() -> Option<(u32, PathBuf)> {
    fs::read_dir("/usr/lib/postgresql")
        .ok()?
        .flatten()
        .filter_map(|entry| {
            let major = entry.file_name().to_str()?.parse::<u32>().ok()?;
            let bin = entry.path().join("bin");
            bin.join("initdb").exists().then_some((major, bin))
        })
        .max_by_key(|(major, _)| *major)
}

/// Creates the cluster if there is none. Fails with a remedy if the cluster has another major version.
pub(super) fn ensure(folder: &DataFolder, major: u32, bin: &Path) -> Result<(), Failed> {
    let data = folder.path.join("postgres/data");
    if let Ok(text) = fs::read_to_string(data.join("PG_VERSION")) {
        let own = text.trim();
        if own != major.to_string() {
            return Err(Failed(format!(
                "the cluster in {} belongs to Postgres {own}, and Postgres {major} is installed. Install postgresql-{own} \
                 beside it, then move the data: pg_upgrade --old-bindir /usr/lib/postgresql/{own}/bin --new-bindir {}",
                data.display(),
                bin.display()
            )));
        }
        return write_access(folder, &data);
    }
    let fresh = folder.path.join("postgres/data.new");
    let _ = fs::remove_dir_all(&fresh);
    let done = Command::new("setpriv")
        .args(["--reuid", &folder.db.name, "--regid", &folder.db.name, "--clear-groups", "--"])
        .arg(bin.join("initdb"))
        .args([
            "--username=postgres",
            "--auth=peer",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--data-checksums",
        ])
        .arg("-D")
        .arg(&fresh)
        .current_dir("/")
        .output()
        .map_err(|error| Failed::doing("initdb", error))?;
    if !done.status.success() {
        return Err(Failed::doing(
            "the database cluster cannot be created",
            String::from_utf8_lossy(&done.stderr),
        ));
    }
    write_access(folder, &fresh)?;
    fs::rename(&fresh, &data).map_err(|error| Failed::doing("the cluster cannot be moved into place", error))
}

/// Writes which system user may log in as which database role. Postgres reads the user from the socket.
fn write_access(folder: &DataFolder, data: &Path) -> Result<(), Failed> {
    let serve = &folder.serve.name;
    let ident = format!(
        "bulkhead {} postgres\nbulkhead root postgres\nbulkhead root bulkhead\nbulkhead root bulkhead_reconciler\n\
         bulkhead {serve} bulkhead\nbulkhead {serve} bulkhead_reconciler\n",
        folder.db.name
    );
    let owner = (folder.db.uid, folder.db.gid);
    for (name, text) in
        [("pg_hba.conf", "local all all peer map=bulkhead\n"), ("pg_ident.conf", ident.as_str())]
    {
        super::folder::write_file(&data.join(name), text, owner, 0o600)?;
    }
    Ok(())
}

/// Waits until Postgres answers, then creates the database. `migrate` creates roles and tables.
pub(super) async fn prepare(data: &Path) -> Result<(), Failed> {
    let options = PgConnectOptions::new_without_pgpass()
        .socket(data.join("run/postgres"))
        .username("postgres")
        .database("postgres");
    let mut tries = 0;
    let mut conn = loop {
        match PgConnection::connect_with(&options).await {
            Ok(conn) => break conn,
            Err(error) if tries > 150 => {
                return Err(Failed::doing("Postgres does not answer (see log/postgres.log)", error));
            }
            Err(_) => {
                tries += 1;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    };
    let there: Option<i32> = sqlx::query_scalar("SELECT 1 FROM pg_database WHERE datname = 'bulkhead'")
        .fetch_optional(&mut conn)
        .await
        .map_err(|error| Failed::doing("the database", error))?;
    if there.is_none() {
        sqlx::query("CREATE DATABASE bulkhead")
            .execute(&mut conn)
            .await
            .map_err(|error| Failed::doing("the database", error))?;
    }
    Ok(())
}
