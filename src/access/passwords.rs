//! Passwords: argon2id, computed on dedicated threads, one per core. A hundred concurrent sign-ins queue
//! instead of using more memory: each thread reuses its 19 MiB, where the threads of a pool would each keep as
//! much. An unknown name costs the same computation.
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
/// Minimum and maximum number of characters (ASVS 6.2.1, 6.2.9).
const LENGTH: (usize, usize) = (8, 256);
/// Maximum number of queued computations. Beyond it, callers get an error and must try again.
const WAITING: usize = 512;

type Job = Box<dyn FnOnce() + Send>;

/// Result of the verification of a password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PasswordVerdict {
    /// The password is wrong.
    Wrong,
    /// The password is correct.
    Right,
    /// The password is correct and its hash is weaker than today's. Store this hash in its place.
    Stronger(String),
}

/// The thread pool that computes all password hashes.
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

fn verify(password: &str, phc: &str) -> Result<PasswordVerdict, Error> {
    let hash = PasswordHash::new(phc).map_err(Error::internal)?;
    if Argon2::default().verify_password(password.as_bytes(), &hash).is_err() {
        return Ok(PasswordVerdict::Wrong);
    }
    Ok(if is_weaker(&hash) { PasswordVerdict::Stronger(compute(password)?) } else { PasswordVerdict::Right })
}

impl Passwords {
    /// Starts one thread per core.
    pub fn new() -> Result<Self, Error> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let (work, jobs) = mpsc::sync_channel::<Job>(WAITING);
        let jobs = Arc::new(Mutex::new(jobs));
        for _ in 0..cores {
            let jobs = Arc::clone(&jobs);
            let next = move || jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let run = move || {
                while let Ok(job) = next() {
                    // A panic in one computation must not end the thread.
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

    /// Returns the number of computations so far.
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
            // Skip the work if the caller is gone.
            if !answer.is_closed() {
                computed.fetch_add(1, Ordering::Relaxed);
                let _ = answer.send(work());
            }
        });
        self.work.try_send(job).map_err(|_| {
            Error::Unavailable("too many sign-ins are in progress".into(), Duration::from_secs(3))
        })?;
        answered.await.map_err(Error::internal)?
    }

    /// Hashes a password. Returns a PHC string.
    pub async fn hash(&self, password: &str) -> Result<String, Error> {
        let password = password.to_owned();
        self.run(move || compute(&password)).await
    }

    /// Verifies a password against a hash. Without a hash (unknown name, or an account that signs in through a
    /// provider only) it computes the same and returns [`PasswordVerdict::Wrong`].
    pub async fn verify(&self, password: &str, phc: Option<&str>) -> Result<PasswordVerdict, Error> {
        let known = phc.is_some();
        let (password, phc) = (password.to_owned(), phc.unwrap_or(&self.nobody).to_owned());
        let verdict = self.run(move || verify(&password, &phc)).await?;
        Ok(if known { verdict } else { PasswordVerdict::Wrong })
    }
}

/// Returns the reason to reject a password, or `None`. There are no composition rules: a password must be long
/// enough and not common. `own` lists words of the user, such as the name.
#[must_use]
pub fn objection(password: &str, own: &[&str]) -> Option<&'static str> {
    let count = password.chars().count();
    if count < LENGTH.0 {
        return Some("a password must have at least 8 characters; four words are better");
    }
    if count > LENGTH.1 {
        return Some("a password must have at most 256 characters");
    }
    let lower = password.to_lowercase();
    if own.iter().any(|word| word.chars().count() >= 3 && lower == word.to_lowercase()) {
        return Some("the password must not be your name");
    }
    // zxcvbn knows 30,000 common passwords and names, and their reversed, repeated and digit-substituted forms.
    // An attacker makes a million guesses within seconds.
    let judged = zxcvbn::zxcvbn(password, own);
    (judged.guesses() < 1_000_000)
        .then_some("this password is too easy to guess; choose another, such as four words")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_hash_says_its_strength_and_a_weaker_one_is_replaced() {
        let passwords = Passwords::new().unwrap();
        let hash = passwords.hash("correct horse battery").await.unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert_eq!(
            passwords.verify("correct horse battery", Some(&hash)).await.unwrap(),
            PasswordVerdict::Right
        );
        assert_eq!(passwords.verify("correct horse", Some(&hash)).await.unwrap(), PasswordVerdict::Wrong);
        let weak = Argon2::new(Algorithm::Argon2id, Version::V0x13, Params::new(8_192, 1, 1, None).unwrap());
        let weak = weak.hash_password(b"correct horse battery").unwrap().to_string();
        let PasswordVerdict::Stronger(new) =
            passwords.verify("correct horse battery", Some(&weak)).await.unwrap()
        else {
            panic!("it is weaker");
        };
        assert!(new.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"));
        assert_eq!(passwords.verify("wrong", Some(&weak)).await.unwrap(), PasswordVerdict::Wrong);
    }

    #[tokio::test]
    async fn nobody_costs_as_much_as_somebody() {
        let passwords = Passwords::new().unwrap();
        let hash = passwords.hash("correct horse battery").await.unwrap();
        let before = passwords.computed();
        assert_eq!(passwords.verify("x", None).await.unwrap(), PasswordVerdict::Wrong);
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
