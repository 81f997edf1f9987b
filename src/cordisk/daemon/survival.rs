//! Whether the disk survives a kill of this process, and how often it has: facts for users.
//!
//! **Touches:** nothing. **Locks:** one leaf lock around the facts.

use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

use control::TakeoverSource;
use control::facts::{TakeoverFacts, Timestamp};
use export::Negotiated;

/// The facts; clones share them.
#[derive(Clone, Debug)]
pub(super) struct Survival {
    facts: Arc<Mutex<TakeoverFacts>>,
}

impl Survival {
    /// The disk was taken over `count` times since the mount, the last time just now if this
    /// process is a successor. It is not protected yet.
    pub(super) fn after(count: u64) -> Survival {
        let last = (count > 0).then(|| Timestamp::from(SystemTime::now()));
        let reason = Some("the disk is not served yet".to_string());
        let facts = TakeoverFacts { possible: false, reason, count, last };
        Survival { facts: Arc::new(Mutex::new(facts)) }
    }

    /// From now on another process takes the disk over if this one is killed.
    pub(super) fn is_possible(&self) {
        let mut facts = self.facts.lock();
        (facts.possible, facts.reason) = (true, None);
    }

    /// If this process is killed, no other one takes the disk over.
    pub(super) fn is_impossible(&self, reason: impl Into<String>) {
        let mut facts = self.facts.lock();
        (facts.possible, facts.reason) = (false, Some(reason.into()));
    }

    /// Returns the function by which the servers ask for the facts.
    pub(super) fn source(&self) -> TakeoverSource {
        let facts = Arc::clone(&self.facts);
        Arc::new(move || facts.lock().clone())
    }
}

/// Returns why a session cannot be taken over, in a few words; `None` if that is not known here.
pub(super) fn obstacle(negotiated: &Negotiated) -> Option<&'static str> {
    if negotiated.over_io_uring && negotiated.rings.is_none() {
        return Some("the session is over io_uring");
    }
    (!negotiated.can_resend()).then_some("the kernel is older than Linux 6.9")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: the reason is one that a user can act on, and goes when the disk is protected.
    #[test]
    fn the_reason_is_told_as_long_as_there_is_one() {
        let survival = Survival::after(2);
        let facts = survival.source();
        let told = facts();
        assert!(!told.possible && told.reason.is_some() && told.count == 2 && told.last.is_some());
        survival.is_possible();
        assert_eq!((facts().possible, facts().reason, facts().count), (true, None, 2));
        survival.is_impossible("the mount keeper has died");
        let told = facts();
        assert_eq!(told.reason.as_deref(), Some("the mount keeper has died"));
        assert!(!told.possible);
        assert_eq!((Survival::after(0).source())().last, None);
        let negotiated = |text: &str| serde_json::from_str::<Negotiated>(text).unwrap();
        let older = r#"{"over-io-uring":false,"minor":39,"max-write":1048576,"capabilities":0}"#;
        assert_eq!(obstacle(&negotiated(older)), Some("the kernel is older than Linux 6.9"));
        let ring = older.replace("false", "true");
        assert_eq!(obstacle(&negotiated(&ring)), Some("the session is over io_uring"));
    }
}
