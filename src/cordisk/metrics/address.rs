//! The argument of `--metrics`.

use std::fmt;
use std::str::FromStr;

/// Address of the metrics server: a name or address of this machine, and a port.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Address {
    /// Name or address, without brackets.
    host: String,
    port: u16,
}

/// Default host: only this machine may read the metrics, unless the user names another address.
const LOOPBACK: &str = "127.0.0.1";

impl Address {
    /// Returns the arguments for [`std::net::ToSocketAddrs`].
    pub(super) fn host_and_port(&self) -> (&str, u16) {
        (&self.host, self.port)
    }
}

impl FromStr for Address {
    type Err = String;

    /// Parses `PORT`, `:PORT`, `HOST:PORT` or `[IPV6]:PORT`. Port 0 is any free port.
    fn from_str(text: &str) -> Result<Address, String> {
        let expected =
            || "expected PORT, HOST:PORT or [IPV6]:PORT, such as 9184 or 127.0.0.1:9184".to_owned();
        let (host, port) = match text.rsplit_once(':') {
            None => (LOOPBACK, text),
            Some(("", port)) => (LOOPBACK, port),
            Some((host, port)) => {
                match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
                    Some(host) => (host, port),
                    // With several colons, the start of the port is ambiguous.
                    None if host.contains([':', '[', ']']) => return Err(expected()),
                    None => (host, port),
                }
            }
        };
        let is_number = !port.is_empty() && port.bytes().all(|digit| digit.is_ascii_digit());
        let port = port.parse().ok().filter(|_| is_number).ok_or_else(expected)?;
        if host.is_empty() || host.chars().any(|c| c.is_whitespace() || c.is_control() || c == '/')
        {
            return Err(expected());
        }
        Ok(Address { host: host.to_owned(), port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_typed_is_understood_or_refused() {
        for (text, meant) in [
            ("9184", "127.0.0.1:9184"),
            (":9184", "127.0.0.1:9184"),
            ("0", "127.0.0.1:0"),
            ("localhost:1", "localhost:1"),
            ("0.0.0.0:65535", "0.0.0.0:65535"),
            ("[::1]:80", "[::1]:80"),
            ("[::]:80", "[::]:80"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), meant, "{text}");
        }
        for text in [
            "",
            ":",
            "localhost",
            "localhost:",
            "::1",
            "::1:80",
            "[::1]",
            "[]:80",
            "1:65536",
            "1:-1",
            "1:+1",
            "a b:1",
            "a/b:1",
            "x:1x",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
