//! Verification of the audit log against its chain. It reports rows that were changed, removed or inserted,
//! seals and rounds that do not match, and an end that was cut off.

use std::collections::{HashMap, HashSet};

use serde::Serialize;
use sqlx::PgPool;
use subtle::ConstantTimeEq;
use time::{Date, OffsetDateTime};

use super::heads::Heads;
use super::seal::{month, round_mac, row_mac, seal_mac};
use super::store::{self, Seal};
use crate::db;
use crate::error::Error;

/// Number of rounds that are read at a time.
const AT_ONCE: i64 = 200;
/// Maximum number of rows that are read at a time.
const ROWS_AT_ONCE: usize = 10_000;
/// Maximum number of findings in a report.
const TOLD: usize = 1_000;

/// A deviation from the chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "finding", rename_all = "kebab-case")]
pub enum ChainFinding {
    /// A row was changed.
    Changed {
        /// Number of the row.
        row: i64,
        /// Number of the tenant; 0 is the platform.
        tenant: i64,
    },
    /// A row is missing.
    Removed {
        /// Number of the row.
        row: i64,
        /// Number of the tenant; 0 is the platform.
        tenant: i64,
    },
    /// A row was inserted outside the platform.
    Inserted {
        /// Number of the row.
        row: i64,
    },
    /// A seal was changed, removed, inserted or moved.
    SealBroken {
        /// Number of the tenant; 0 is the platform.
        tenant: i64,
        /// Number of the seal.
        seal: i64,
    },
    /// A round was changed, removed or inserted.
    RoundBroken {
        /// Number of the round.
        round: i64,
    },
    /// The heads outside the database name rounds that are missing.
    TailCut {
        /// First missing round.
        round: i64,
    },
    /// A month is marked as retired, but the audit log has no record of it.
    NotRetired {
        /// First day of the month.
        month: Date,
    },
    /// A head outside the database differs from the round's.
    HeadDiffers {
        /// Number of the round.
        round: i64,
    },
}

impl std::fmt::Display for ChainFinding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Changed { row, tenant } => write!(f, "row {row} (tenant {tenant}) was changed"),
            Self::Removed { row, tenant } => write!(f, "row {row} (tenant {tenant}) was removed"),
            Self::Inserted { row } => write!(f, "row {row} was inserted outside the platform"),
            Self::SealBroken { tenant, seal } => {
                write!(
                    f,
                    "seal {seal} of tenant {tenant} does not match: it was changed, removed, inserted or moved"
                )
            }
            Self::RoundBroken { round } => {
                write!(f, "round {round} does not match: it was changed, removed or inserted")
            }
            Self::TailCut { round } => {
                write!(f, "the end was cut off: round {round} and all later rounds are missing")
            }
            Self::NotRetired { month } => {
                write!(
                    f,
                    "the month of {month} is missing, and the audit log has no record of its retirement"
                )
            }
            Self::HeadDiffers { round } => write!(f, "round {round} differs from its exported head"),
        }
    }
}

/// Result of a verification.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Number of verified rounds.
    pub rounds: i64,
    /// Number of rows that match.
    pub rows: i64,
    /// Number of rows that are too new to be in a round.
    pub unsealed: i64,
    /// Number of rows in retired months.
    pub retired: i64,
    /// Whether heads outside the database were compared.
    pub heads: bool,
    /// Deviations, at most a thousand.
    pub findings: Vec<ChainFinding>,
}

struct ChainWalk<'a> {
    key: &'a [u8; 32],
    /// Months that the table marks as retired, with the time, and those that a sealed record confirms.
    retired: HashMap<Date, OffsetDateTime>,
    confirmed: HashSet<String>,
    last: HashMap<i64, (i64, Vec<u8>)>,
    report: Report,
}

impl ChainWalk<'_> {
    fn find(&mut self, finding: ChainFinding) {
        if self.report.findings.len() < TOLD {
            self.report.findings.push(finding);
        }
    }

    fn is_retired(&self, seal: &Seal) -> bool {
        !self.retired.is_empty()
            && [seal.first_at, seal.last_at]
                .into_iter()
                .all(|at| month(at).is_some_and(|month| self.retired.contains_key(&month)))
    }

    /// Checks a seal: its position in the tenant's chain and its MAC.
    fn seal(&mut self, seal: &Seal) {
        let tenant = seal.tenant_id.unwrap_or(0);
        let (number, before) = self.last.remove(&tenant).unwrap_or((0, Vec::new()));
        let fits = bool::from(seal_mac(self.key, seal, &before).ct_eq(&seal.mac));
        if seal.number != number + 1 || !fits {
            self.find(ChainFinding::SealBroken { tenant, seal: seal.number });
        }
        self.last.insert(tenant, (seal.number, seal.mac.clone()));
    }
}

/// Verifies the whole log. `pool` must use a role that sees all tenants.
pub async fn verify(pool: &PgPool, key: &[u8; 32], heads: &Heads) -> Result<Report, Error> {
    let mut tx = db::begin_for_all(pool).await?;
    store::look_at_one_moment(&mut tx).await?;
    let exported = heads.read().map_err(Error::internal)?;
    let report = Report {
        rounds: 0,
        rows: 0,
        unsealed: 0,
        retired: 0,
        heads: !exported.is_empty(),
        findings: Vec::new(),
    };
    let retired = store::list_retired(&mut tx).await?.into_iter().collect();
    let mut walk = ChainWalk { key, retired, confirmed: HashSet::new(), last: HashMap::new(), report };
    let (mut last, mut before, mut to) = (0, Vec::new(), "0".to_owned());
    let mut expected: HashMap<i64, Vec<u8>> = HashMap::new();
    for (round, mac) in exported {
        // Two heads with one number: rounds were cut off and made again.
        if expected.insert(round, mac.clone()).is_some_and(|before| before != mac) {
            walk.find(ChainFinding::HeadDiffers { round });
        }
    }
    loop {
        let rounds = store::list_rounds(&mut tx, last, AT_ONCE).await?;
        let Some(end) = rounds.last().map(|round| round.number) else { break };
        let seals = store::list_seals(&mut tx, last + 1, end).await?;
        for round in rounds {
            let own: Vec<Seal> = seals.iter().filter(|seal| seal.round == round.number).cloned().collect();
            for seal in &own {
                walk.seal(seal);
            }
            let mac = round_mac(key, round.number, &round.tx_to, round.last_id, &own, &before);
            if round.number != last + 1 || !bool::from(mac.ct_eq(&round.mac)) {
                walk.find(ChainFinding::RoundBroken { round: last + 1 });
            }
            if expected.remove(&round.number).is_some_and(|head| head != round.mac) {
                walk.find(ChainFinding::HeadDiffers { round: round.number });
            }
            (last, before, to) = (round.number, round.mac, round.tx_to);
            walk.report.rounds += 1;
        }
        for some in parts(&seals) {
            rows(&mut tx, &mut walk, some).await?;
        }
    }
    if let Some(missing) = expected.keys().copied().filter(|number| *number > last).min() {
        walk.find(ChainFinding::TailCut { round: missing });
    }
    for (gone, at) in walk.retired.clone() {
        // The record of an old retirement lies in a month that was itself retired later, which has a record.
        let followed = month(at).is_some_and(|later| later > gone && walk.retired.contains_key(&later));
        if !followed && !walk.confirmed.contains(&gone.to_string()) {
            walk.find(ChainFinding::NotRetired { month: gone });
        }
    }
    let (sealed, new) = store::count_rows(&mut tx, &to).await?;
    walk.report.unsealed = new;
    if sealed != walk.report.rows || !walk.report.findings.is_empty() {
        for row in store::list_inserted(&mut tx, &to).await? {
            walk.find(ChainFinding::Inserted { row });
        }
    }
    Ok(walk.report)
}

/// Splits seals into parts with a bounded number of rows, so that memory use stays flat.
fn parts(mut seals: &[Seal]) -> Vec<&[Seal]> {
    let mut all = Vec::new();
    while !seals.is_empty() {
        let mut rows = 0;
        let more = seals.iter().take_while(|seal| {
            rows += seal.ids.len();
            rows <= ROWS_AT_ONCE
        });
        // A seal with more rows is a part of its own.
        let (part, rest) = seals.split_at(more.count().max(1));
        all.push(part);
        seals = rest;
    }
    all
}

/// Checks the rows of some seals, with one query.
async fn rows(conn: &mut sqlx::PgConnection, walk: &mut ChainWalk<'_>, seals: &[Seal]) -> Result<(), Error> {
    let (gone, here): (Vec<&Seal>, Vec<&Seal>) = seals.iter().partition(|seal| walk.is_retired(seal));
    walk.report.retired += gone.iter().map(|seal| i64::try_from(seal.ids.len()).unwrap_or(0)).sum::<i64>();
    let ids: Vec<i64> = here.iter().flat_map(|seal| seal.ids.iter().copied()).collect();
    let (Some(first), Some(end)) =
        (here.iter().map(|seal| seal.first_at).min(), here.iter().map(|seal| seal.last_at).max())
    else {
        return Ok(());
    };
    let found: HashMap<i64, _> =
        store::list_rows(conn, &ids, first, end).await?.into_iter().map(|row| (row.id, row)).collect();
    let mut missing = Vec::new();
    for seal in here {
        let tenant = seal.tenant_id.unwrap_or(0);
        for (id, mac) in seal.ids.iter().zip(seal.macs.chunks_exact(16)) {
            match found.get(id) {
                Some(row) if bool::from(row_mac(walk.key, row).ct_eq(mac)) => {
                    walk.report.rows += 1;
                    // No month is retired within 90 days of its end: an earlier record is forged.
                    let then = (row.at - time::Duration::days(118)).date().to_string();
                    let in_time = row.object <= then;
                    if row.tenant_id.is_none()
                        && row.action == "audit.retire"
                        && row.actor == "platform"
                        && in_time
                    {
                        walk.confirmed.insert(row.object.clone());
                    }
                }
                Some(_) => walk.find(ChainFinding::Changed { row: *id, tenant }),
                None => missing.push((*id, tenant)),
            }
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let ids: Vec<i64> = missing.iter().map(|(id, _)| *id).collect();
    let moved: HashSet<i64> = store::list_moved(conn, &ids).await?.into_iter().collect();
    for (row, tenant) in missing {
        walk.find(if moved.contains(&row) {
            ChainFinding::Changed { row, tenant }
        } else {
            ChainFinding::Removed { row, tenant }
        });
    }
    Ok(())
}
