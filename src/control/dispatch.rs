//! Dispatch: from a decoded value to a command and its answer.

use serde_json::Value;

use super::arguments::Arguments;
use super::call::{Call, Session, Target};
use super::codec::{self, Class, Oob, QmpError};
use super::command::{self, NEGOTIATION};

/// The answer to one value that a client has sent.
pub(super) enum CommandAnswer {
    /// The line of the reply.
    Now(String),
    /// The reply is sent when the server shuts down.
    AtTheEnd {
        /// Id of the request.
        id: Option<Value>,
    },
}

impl Session {
    pub fn new() -> Self {
        Session { negotiated: false, oob: Oob::Off, hold: None, progress: None, quitting: false }
    }

    /// Answers one value, or one error, of the decoder.
    pub fn answer(&mut self, target: &Target, input: Result<Value, String>) -> CommandAnswer {
        let refuse =
            |desc: &str| CommandAnswer::Now(codec::reply(Err(QmpError::generic(desc)), None));
        let mut members = match input {
            Ok(Value::Object(members)) => members,
            Ok(_) => return refuse("QMP input must be a JSON object"),
            Err(desc) => return refuse(&desc),
        };
        let id = members.remove("id");
        let result = codec::check(members, self.oob).and_then(|request| self.run(target, request));
        match self.quitting {
            true => CommandAnswer::AtTheEnd { id },
            false => CommandAnswer::Now(codec::reply(result, id)),
        }
    }

    fn run(&mut self, target: &Target, request: codec::QmpRequest) -> Result<Value, QmpError> {
        if !self.negotiated && request.command != NEGOTIATION {
            return Err(QmpError::new(
                Class::CommandNotFound,
                format!("Expecting capabilities negotiation with '{NEGOTIATION}'"),
            ));
        }
        let command = command::find(&request)?;
        let arguments = Arguments::check(command.arguments, request.arguments)?;
        (command.run)(&mut Call { arguments, target, session: self })
    }
}
