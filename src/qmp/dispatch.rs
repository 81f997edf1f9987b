//! A client's side of the conversation: what it may ask, and which answer it gets.

use serde_json::Value;

use super::arguments::Arguments;
use super::call::{Backend, Call, Session};
use super::codec::{self, Class, Oob, Refusal};
use super::command::{self, NEGOTIATION};

/// The answer to one value a client has sent.
pub(super) enum Answer {
    /// The line of the reply.
    Now(String),
    /// The reply is due when everything is over.
    AtTheEnd {
        /// The request's id.
        id: Option<Value>,
    },
}

impl Session {
    pub fn new() -> Self {
        Session { negotiated: false, oob: Oob::Off, hold: None, progress: None, quitting: false }
    }

    /// Answers what the decoder has found.
    pub fn answer(&mut self, backend: &Backend, input: Result<Value, String>) -> Answer {
        let refuse = |desc: &str| Answer::Now(codec::reply(Err(Refusal::generic(desc)), None));
        let mut members = match input {
            Ok(Value::Object(members)) => members,
            Ok(_) => return refuse("QMP input must be a JSON object"),
            Err(desc) => return refuse(&desc),
        };
        let id = members.remove("id");
        let result = codec::check(members, self.oob).and_then(|request| self.run(backend, request));
        match self.quitting {
            true => Answer::AtTheEnd { id },
            false => Answer::Now(codec::reply(result, id)),
        }
    }

    fn run(&mut self, backend: &Backend, request: codec::Request) -> Result<Value, Refusal> {
        if !self.negotiated && request.command != NEGOTIATION {
            return Err(Refusal::new(Class::CommandNotFound, format!("Expecting capabilities negotiation with '{NEGOTIATION}'")));
        }
        let command = command::find(&request)?;
        let arguments = Arguments::check(command.arguments, request.arguments)?;
        (command.run)(&mut Call { arguments, backend, session: self })
    }
}
