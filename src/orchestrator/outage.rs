//! Files of the state folder that cannot be written: one line in the log when it begins and one
//! when it ends, and a word in `/health` between. Serving goes on.

use super::handle::{Inbox, Message};

/// Of one writer thread.
#[derive(Debug)]
pub struct Outage {
    what: &'static str,
    /// What is lost meanwhile, for people.
    cost: &'static str,
    inbox: Inbox,
    is_out: bool,
}

/// Told to the owner; `why: None`: it works again.
#[derive(Debug)]
pub struct OutageNews {
    pub what: &'static str,
    pub why: Option<String>,
}

impl Outage {
    pub fn new(what: &'static str, cost: &'static str, inbox: Inbox) -> Outage {
        Outage { what, cost, inbox, is_out: false }
    }

    pub fn begins(&mut self, error: &std::io::Error) {
        if std::mem::replace(&mut self.is_out, true) {
            return;
        }
        let why = format!("{} cannot be written: {error}; {}", self.what, self.cost);
        tracing::warn!("{why}");
        self.tell(Some(why));
    }

    pub fn ends(&mut self) {
        if std::mem::replace(&mut self.is_out, false) {
            tracing::info!("{} can be written again", self.what);
            self.tell(None);
        }
    }

    pub fn is_out(&self) -> bool {
        self.is_out
    }

    fn tell(&self, why: Option<String>) {
        self.inbox.send(Message::Outage(OutageNews { what: self.what, why }));
    }
}
