//! Passwords: argon2id, on as many threads of their own as there are cores, so that a hundred people who sign in
//! at once take turns and not memory: each thread takes its 19 MiB again and again, where a pool's threads would
//! keep as much each. A name that nobody has costs the same computation.
//!
//! Parameters: OWASP's password storage cheat sheet and ASVS 5.0, appendix C (m = 19 MiB, t = 2, p = 1).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use argon2::{Algorithm, Argon2, Params, Version};
use tokio::sync::oneshot;

use crate::error::Error;

const MEMORY_KIB: u32 = 19_456;
const PASSES: u32 = 2;
/// Fewest and most characters (ASVS 6.2.1, 6.2.9).
const LENGTH: (usize, usize) = (8, 256);
/// How many may wait for their turn; beyond, "try again".
const WAITING: usize = 512;

type Job = Box<dyn FnOnce() + Send>;

/// What came of holding a password against its hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is not the one.
    Wrong,
    /// It is.
    Right,
    /// It is, and its hash was weaker than today's: this one takes its place.
    Stronger(String),
}

/// The one place where passwords are computed.
#[derive(Debug, Clone)]
pub struct Passwords {
    work: mpsc::SyncSender<Job>,
    computed: Arc<AtomicU64>,
    nobody: Arc<str>,
}

fn hasher() -> Result<Argon2<'static>, Error> {
    let params = Params::new(MEMORY_KIB, PASSES, 1, None).map_err(Error::internal)?;
    Ok(Argon2::new(Algorithm::Argon2id, Version::V0x13, params))
}

fn compute(password: &str) -> Result<String, Error> {
    Ok(hasher()?.hash_password(password.as_bytes()).map_err(Error::internal)?.to_string())
}

fn is_weaker(hash: &PasswordHash) -> bool {
    let good = Params::try_from(hash).is_ok_and(|params| {
        params.m_cost() >= MEMORY_KIB && params.t_cost() >= PASSES && params.p_cost() >= 1
    });
    !good || hash.algorithm.as_str() != "argon2id"
}

fn verify(password: &str, phc: &str) -> Result<Verdict, Error> {
    let hash = PasswordHash::new(phc).map_err(Error::internal)?;
    if Argon2::default().verify_password(password.as_bytes(), &hash).is_err() {
        return Ok(Verdict::Wrong);
    }
    Ok(if is_weaker(&hash) { Verdict::Stronger(compute(password)?) } else { Verdict::Right })
}

impl Passwords {
    /// With a turn for each core.
    pub fn new() -> Result<Self, Error> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let (work, jobs) = mpsc::sync_channel::<Job>(WAITING);
        let jobs = Arc::new(Mutex::new(jobs));
        for _ in 0..cores {
            let jobs = Arc::clone(&jobs);
            let next = move || jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let run = move || {
                while let Ok(job) = next() {
                    // A mistake in one computation takes no thread away from all others.
                    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
                }
            };
            std::thread::Builder::new().name("passwords".into()).spawn(run).map_err(Error::internal)?;
        }
        Ok(Self {
            work,
            computed: Arc::default(),
            nobody: compute(&data_encoding::HEXLOWER.encode(&rand::random::<[u8; 16]>()))?.into(),
        })
    }

    /// How many computations there have been.
    #[must_use]
    pub fn computed(&self) -> u64 {
        self.computed.load(Ordering::Relaxed)
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        let computed = Arc::clone(&self.computed);
        let job = Box::new(move || {
            // Whoever asked may have gone meanwhile: nothing is computed for nobody.
            if !answer.is_closed() {
                computed.fetch_add(1, Ordering::Relaxed);
                let _ = answer.send(work());
            }
        });
        self.work.try_send(job).map_err(|_| {
            Error::Unavailable("too many people are signing in right now".into(), Duration::from_secs(3))
        })?;
        answered.await.map_err(Error::internal)?
    }

    /// The hash of a password, as a PHC string.
    pub async fn hash(&self, password: &str) -> Result<String, Error> {
        let password = password.to_owned();
        self.run(move || compute(&password)).await
    }

    /// Holds a password against a hash. Without one (nobody of that name, or somebody who comes through a
    /// provider only) the same is computed, and it is wrong.
    pub async fn verify(&self, password: &str, phc: Option<&str>) -> Result<Verdict, Error> {
        let known = phc.is_some();
        let (password, phc) = (password.to_owned(), phc.unwrap_or(&self.nobody).to_owned());
        let verdict = self.run(move || verify(&password, &phc)).await?;
        Ok(if known { verdict } else { Verdict::Wrong })
    }
}

/// Why a text will not do as a password; none if it will. No rule of composition: length, and none of those
/// that are tried first. `own` are words of the person, such as the name.
#[must_use]
pub fn objection(password: &str, own: &[&str]) -> Option<&'static str> {
    let count = password.chars().count();
    if count < LENGTH.0 {
        return Some("a password has at least 8 characters; a sentence of four words is better");
    }
    if count > LENGTH.1 {
        return Some("a password has at most 256 characters");
    }
    let lower = password.to_lowercase();
    if own.iter().any(|word| word.chars().count() >= 3 && lower == word.to_lowercase()) {
        return Some("a password is not one's own name");
    }
    // A lexicon of 30,000 common passwords and names, and of what is made of them by turning, repeating or
    // writing in digits; fewer than a million guesses are a matter of seconds.
    let judged = zxcvbn::zxcvbn(password, own);
    (judged.guesses() < 1_000_000)
        .then_some("this password is among those that are tried first; take another, such as four words")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_hash_says_its_strength_and_a_weaker_one_is_replaced() {
        let passwords = Passwords::new().unwrap();
        let hash = passwords.hash("correct horse battery").await.unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert_eq!(passwords.verify("correct horse battery", Some(&hash)).await.unwrap(), Verdict::Right);
        assert_eq!(passwords.verify("correct horse", Some(&hash)).await.unwrap(), Verdict::Wrong);
        let weak = Argon2::new(Algorithm::Argon2id, Version::V0x13, Params::new(8_192, 1, 1, None).unwrap());
        let weak = weak.hash_password(b"correct horse battery").unwrap().to_string();
        let Verdict::Stronger(new) = passwords.verify("correct horse battery", Some(&weak)).await.unwrap()
        else {
            panic!("it is weaker");
        };
        assert!(new.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"));
        assert_eq!(passwords.verify("wrong", Some(&weak)).await.unwrap(), Verdict::Wrong);
    }

    #[tokio::test]
    async fn nobody_costs_as_much_as_somebody() {
        let passwords = Passwords::new().unwrap();
        let hash = passwords.hash("correct horse battery").await.unwrap();
        let before = passwords.computed();
        assert_eq!(passwords.verify("x", None).await.unwrap(), Verdict::Wrong);
        assert_eq!(passwords.computed(), before + 1);
        passwords.verify("x", Some(&hash)).await.unwrap();
        assert_eq!(passwords.computed(), before + 2);
    }

    #[test]
    fn what_is_tried_first_is_refused() {
        for bad in [
            "short",
            "password",
            "password1",
            "Passw0rd",
            "12345678",
            "qwertyuiop",
            "iloveyou",
            "drowssap",
            "aaaaaaaaaaaa",
            "alice@example.org",
        ] {
            assert!(objection(bad, &["alice@example.org"]).is_some(), "{bad}");
        }
        for good in [
            "correct horse battery",
            "mZ4-kf8.Qa2x",
            &"a sentence of many words that nobody has thought of before ".repeat(3),
        ] {
            assert!(objection(good, &["alice"]).is_none(), "{good}");
        }
        assert!(objection(&"x9".repeat(200), &[]).is_some());
    }
}
