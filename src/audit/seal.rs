//! Sealing of the audit log, a second after the rows are written. A round takes every row of the transactions
//! below the snapshot's horizon. None of these transactions is still open, so no row can appear there later. A
//! round makes one seal per tenant with new rows, and a MAC over all seals. Requests never wait for it.

use std::time::Duration;

use sqlx::PgPool;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use super::heads::Heads;
use super::store::{self, Seal, Sealable};
use crate::db;
use crate::error::Error;
use crate::keys::mac;

const PAUSE: Duration = Duration::from_secs(1);
/// Maximum number of rows per round, unless a single transaction has more.
const AT_ONCE: i64 = 5_000;

/// Returns the month of a time, as its first day.
pub(super) fn month(at: OffsetDateTime) -> Option<time::Date> {
    let at = at.to_offset(time::UtcOffset::UTC);
    time::Date::from_calendar_date(at.year(), at.month(), 1).ok()
}

fn micros(at: OffsetDateTime) -> i128 {
    at.unix_timestamp_nanos() / 1_000
}

/// Returns a row's part of its seal: sixteen bytes.
pub(super) fn row_mac(key: &[u8; 32], row: &Sealable) -> [u8; 16] {
    let full = mac(
        key,
        &[
            b"row",
            &row.id.to_be_bytes(),
            &micros(row.at).to_be_bytes(),
            &row.tenant_id.unwrap_or(0).to_be_bytes(),
            row.actor.as_bytes(),
            row.via.as_deref().unwrap_or_default().as_bytes(),
            row.action.as_bytes(),
            row.object.as_bytes(),
            row.result.as_bytes(),
            row.request_id.as_bytes(),
            row.detail.as_bytes(),
        ],
    );
    let mut short = [0; 16];
    short.copy_from_slice(&full[..16]);
    short
}

/// Returns the MAC of a seal, chained to the previous seal of the tenant.
pub(super) fn seal_mac(key: &[u8; 32], seal: &Seal, before: &[u8]) -> [u8; 32] {
    let ids: Vec<u8> = seal.ids.iter().flat_map(|id| id.to_be_bytes()).collect();
    mac(
        key,
        &[
            b"seal",
            &seal.round.to_be_bytes(),
            &seal.tenant_id.unwrap_or(0).to_be_bytes(),
            &seal.number.to_be_bytes(),
            &ids,
            &seal.macs,
            &micros(seal.first_at).to_be_bytes(),
            &micros(seal.last_at).to_be_bytes(),
            before,
        ],
    )
}

/// Returns the MAC of a round, chained to the previous round.
pub(super) fn round_mac(
    key: &[u8; 32],
    number: i64,
    to: &str,
    last_id: i64,
    seals: &[Seal],
    before: &[u8],
) -> [u8; 32] {
    let inner: Vec<u8> = seals.iter().flat_map(|seal| seal.mac.clone()).collect();
    mac(key, &[b"round", &number.to_be_bytes(), to.as_bytes(), &last_id.to_be_bytes(), &inner, before])
}

/// Seals the next round, if there are new rows. Returns its number.
pub async fn seal(pool: &PgPool, key: &[u8; 32], heads: &Heads) -> Result<Option<i64>, Error> {
    let mut tx = db::begin_for_all(pool).await?;
    if !store::try_lock(&mut tx).await? {
        return Ok(None);
    }
    let horizon = store::horizon(&mut tx, AT_ONCE).await?;
    if !horizon.some {
        return Ok(None);
    }
    let rows = if horizon.restored {
        store::list_unsealed(&mut tx, &horizon.to).await?
    } else {
        store::list_between(&mut tx, &horizon).await?
    };
    let number = horizon.number + 1;
    let last_id = rows.iter().map(|row| row.id).max().unwrap_or(0);
    let mut seals: Vec<Seal> = Vec::new();
    // A seal never spans two months, because one month may be retired before the other.
    for group in rows.chunk_by(|a, b| a.tenant_id == b.tenant_id && month(a.at) == month(b.at)) {
        let tenant = group[0].tenant_id;
        let (last, before) = match seals.last().filter(|seal| seal.tenant_id == tenant) {
            Some(seal) => (seal.number, seal.mac.clone()),
            None => store::last_seal(&mut tx, tenant).await?.unwrap_or((0, Vec::new())),
        };
        let mut seal = Seal {
            round: number,
            tenant_id: tenant,
            number: last + 1,
            ids: group.iter().map(|row| row.id).collect(),
            first_at: group.iter().map(|row| row.at).min().unwrap_or(group[0].at),
            last_at: group.iter().map(|row| row.at).max().unwrap_or(group[0].at),
            macs: group.iter().flat_map(|row| row_mac(key, row)).collect(),
            mac: Vec::new(),
        };
        seal.mac = seal_mac(key, &seal, &before).to_vec();
        seals.push(seal);
    }
    let before = horizon.mac.clone().unwrap_or_default();
    let mac = round_mac(key, number, &horizon.to, last_id, &seals, &before);
    store::insert_round(&mut tx, number, &horizon, last_id, &mac).await?;
    for seal in &seals {
        store::insert_seal(&mut tx, seal).await?;
    }
    fail::fail_point!("audit::seal_commit", |_| Err(Error::internal("failpoint")));
    tx.commit().await?;
    // A crash here leaves the file one head behind. The verification tolerates a file that lacks the newest
    // head.
    heads.append(number, &mac).map_err(Error::internal)?;
    tracing::debug!(round = number, head = data_encoding::HEXLOWER.encode(&mac), "the audit log is sealed");
    Ok(Some(number))
}

/// Seals once a second until `stop`, then a last time.
pub async fn run(pool: PgPool, key: [u8; 32], heads: Heads, stop: CancellationToken) {
    loop {
        let last = tokio::select! {
            () = stop.cancelled() => true,
            () = tokio::time::sleep(PAUSE) => false,
        };
        // Continue while a round leaves rows over.
        for _ in 0..1_000 {
            match seal(&pool, &key, &heads).await {
                Ok(Some(_)) if !last => {}
                Ok(_) => break,
                Err(error) => {
                    tracing::warn!(error = error.for_log(), "cannot seal the audit log; retrying");
                    break;
                }
            }
        }
        if last {
            return;
        }
    }
}
