//! Holds the audit against its chain: which row was changed, taken out or put in, which seal or round does not
//! fit, whether the end was cut off.

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

/// Rounds that are looked at together.
const AT_ONCE: i64 = 200;
/// Rows that are read together.
const ROWS_AT_ONCE: usize = 10_000;
/// Most findings that are told one by one.
const TOLD: usize = 1_000;

/// Something that does not fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "finding", rename_all = "kebab-case")]
pub enum Finding {
    /// A row is not what it was.
    Changed {
        /// Number of the row.
        row: i64,
        /// Number of the tenant; 0 is the platform.
        tenant: i64,
    },
    /// A row is gone.
    Removed {
        /// Number of the row.
        row: i64,
        /// Number of the tenant; 0 is the platform.
        tenant: i64,
    },
    /// A row was put in behind the platform's back.
    Inserted {
        /// Number of the row.
        row: i64,
    },
    /// A seal was changed, taken out, put in or moved.
    SealBroken {
        /// Number of the tenant; 0 is the platform.
        tenant: i64,
        /// Number of the seal.
        seal: i64,
    },
    /// A round was changed, taken out or put in.
    RoundBroken {
        /// Number of the round.
        round: i64,
    },
    /// The heads outside the database know of rounds that are not there (any more).
    TailCut {
        /// First round that is missing.
        round: i64,
    },
    /// A month is said to have been given up, and no record of the audit says so.
    NotRetired {
        /// First day of the month.
        month: Date,
    },
    /// A head outside the database is another than the round's.
    HeadDiffers {
        /// Number of the round.
        round: i64,
    },
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Changed { row, tenant } => write!(f, "row {row} (tenant {tenant}) was changed"),
            Self::Removed { row, tenant } => write!(f, "row {row} (tenant {tenant}) was taken out"),
            Self::Inserted { row } => write!(f, "row {row} was put in behind the platform's back"),
            Self::SealBroken { tenant, seal } => {
                write!(f, "seal {seal} of tenant {tenant} does not fit: changed, taken out, put in or moved")
            }
            Self::RoundBroken { round } => {
                write!(f, "round {round} does not fit: changed, taken out or put in")
            }
            Self::TailCut { round } => {
                write!(f, "the end was cut off: round {round} and what followed is gone")
            }
            Self::NotRetired { month } => {
                write!(f, "the month of {month} is gone, and no record says that it was given up")
            }
            Self::HeadDiffers { round } => write!(f, "round {round} is not the one whose head was exported"),
        }
    }
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Rounds that were looked at.
    pub rounds: i64,
    /// Rows that fit.
    pub rows: i64,
    /// Rows so new that no round has them yet.
    pub unsealed: i64,
    /// Rows of months that were given up after their time.
    pub retired: i64,
    /// Whether there were heads to compare with.
    pub heads: bool,
    /// What does not fit; at most a thousand.
    pub findings: Vec<Finding>,
}

struct Walk<'a> {
    key: &'a [u8; 32],
    /// Months that the table says were given up, when, and those of them that a record of the chain confirms.
    retired: HashMap<Date, OffsetDateTime>,
    confirmed: HashSet<String>,
    last: HashMap<i64, (i64, Vec<u8>)>,
    report: Report,
}

impl Walk<'_> {
    fn find(&mut self, finding: Finding) {
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

    /// The seal itself: its place in the tenant's chain and its MAC.
    fn seal(&mut self, seal: &Seal) {
        let tenant = seal.tenant_id.unwrap_or(0);
        let (number, before) = self.last.remove(&tenant).unwrap_or((0, Vec::new()));
        let fits = bool::from(seal_mac(self.key, seal, &before).ct_eq(&seal.mac));
        if seal.number != number + 1 || !fits {
            self.find(Finding::SealBroken { tenant, seal: seal.number });
        }
        self.last.insert(tenant, (seal.number, seal.mac.clone()));
    }
}

/// Verifies everything. `pool` is of a role that sees all tenants.
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
    let mut walk = Walk { key, retired, confirmed: HashSet::new(), last: HashMap::new(), report };
    let (mut last, mut before, mut to) = (0, Vec::new(), "0".to_owned());
    let mut expected: HashMap<i64, Vec<u8>> = HashMap::new();
    for (round, mac) in exported {
        // Two heads of one number: rounds were cut off and made anew.
        if expected.insert(round, mac.clone()).is_some_and(|before| before != mac) {
            walk.find(Finding::HeadDiffers { round });
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
                walk.find(Finding::RoundBroken { round: last + 1 });
            }
            if expected.remove(&round.number).is_some_and(|head| head != round.mac) {
                walk.find(Finding::HeadDiffers { round: round.number });
            }
            (last, before, to) = (round.number, round.mac, round.tx_to);
            walk.report.rounds += 1;
        }
        for some in parts(&seals) {
            rows(&mut tx, &mut walk, some).await?;
        }
    }
    if let Some(missing) = expected.keys().copied().filter(|number| *number > last).min() {
        walk.find(Finding::TailCut { round: missing });
    }
    for (gone, at) in walk.retired.clone() {
        // The record of an old retirement lies in a month that was given up later; that one has a record.
        let followed = month(at).is_some_and(|later| later > gone && walk.retired.contains_key(&later));
        if !followed && !walk.confirmed.contains(&gone.to_string()) {
            walk.find(Finding::NotRetired { month: gone });
        }
    }
    let (sealed, new) = store::count_rows(&mut tx, &to).await?;
    walk.report.unsealed = new;
    if sealed != walk.report.rows || !walk.report.findings.is_empty() {
        for row in store::list_inserted(&mut tx, &to).await? {
            walk.find(Finding::Inserted { row });
        }
    }
    Ok(walk.report)
}

/// Seals one after another, as many together as have a bounded number of rows, so that memory stays flat.
fn parts(mut seals: &[Seal]) -> Vec<&[Seal]> {
    let mut all = Vec::new();
    while !seals.is_empty() {
        let mut rows = 0;
        let more = seals.iter().take_while(|seal| {
            rows += seal.ids.len();
            rows <= ROWS_AT_ONCE
        });
        // One that alone has more is looked at alone.
        let (part, rest) = seals.split_at(more.count().max(1));
        all.push(part);
        seals = rest;
    }
    all
}

/// The rows of some seals, all in one question.
async fn rows(conn: &mut sqlx::PgConnection, walk: &mut Walk<'_>, seals: &[Seal]) -> Result<(), Error> {
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
                    // No month goes within 90 days of its end: a record that says so earlier is none of ours.
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
                Some(_) => walk.find(Finding::Changed { row: *id, tenant }),
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
            Finding::Changed { row, tenant }
        } else {
            Finding::Removed { row, tenant }
        });
    }
    Ok(())
}
