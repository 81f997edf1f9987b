//! The credentials of the environment, which only the fetcher gets.
//!
//! ```text
//! cordisk mount ──▶ itself, executed anew without them: the keeper ──▶ cordisk-fetcher
//!   (environment)        (from a file in memory into its memory)        (environment)
//! ```
//! The environment of a process can be read in /proc by every process of its user, and a child
//! inherits it. A process cannot remove a variable from its own without `unsafe`, so the program
//! executes itself.
//!
//! **Touches:** the environment, a file in memory. **Never:** prints a value. **Locks:** none.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use host::error::Context;
use host::{Error, ErrorKind, Result};

/// What the names of variables of the clouds begin with.
const CLOUDS: [&[u8]; 3] = [b"AWS_", b"AZURE_", b"GOOGLE_"];

/// The variables of proxies, whose URL may contain a password; in lower or upper case.
const PROXIES: [&str; 3] = ["http_proxy", "https_proxy", "all_proxy"];

/// The longest list in bytes. Linux allows less for a whole environment by default.
const LONGEST: u64 = 4 << 20;

/// What a file in memory must have, so that nothing changes it any more.
const SEALS: SealFlags =
    SealFlags::WRITE.union(SealFlags::GROW).union(SealFlags::SHRINK).union(SealFlags::SEAL);

/// Variables with credentials, by name and value.
#[derive(Clone, Default, Eq, PartialEq)]
pub struct Credentials(Vec<(OsString, OsString)>);

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}

impl Credentials {
    /// Those of the environment of this process.
    pub fn of_environment() -> Credentials {
        Credentials::among(std::env::vars_os())
    }

    fn among(variables: impl Iterator<Item = (OsString, OsString)>) -> Credentials {
        Credentials(variables.filter(|(name, value)| is_credential(name, value)).collect())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The names of the variables.
    pub fn names(&self) -> impl Iterator<Item = &OsStr> {
        self.0.iter().map(|(name, _)| name.as_os_str())
    }

    /// The variables.
    pub fn variables(&self) -> impl Iterator<Item = (&OsStr, &OsStr)> {
        self.0.iter().map(|(name, value)| (name.as_os_str(), value.as_os_str()))
    }

    /// Writes them into a file in memory, which a program that this process executes inherits.
    ///
    /// # Errors
    /// Those of memfd_create(2) and write(2).
    pub fn to_file(&self) -> Result<OwnedFd> {
        let what = || "a file in memory for the credentials of the environment";
        let file = rustix::fs::memfd_create(c"cordisk-credentials", MemfdFlags::NOEXEC_SEAL);
        let file = match file {
            // Linux before 6.3.
            Err(Errno::INVAL) => {
                rustix::fs::memfd_create(c"cordisk-credentials", MemfdFlags::ALLOW_SEALING)
            }
            file => file,
        };
        let mut file = File::from(file.map_err(std::io::Error::from).context(what)?);
        for (name, value) in &self.0 {
            for part in [name.as_encoded_bytes(), b"=", value.as_encoded_bytes(), b"\0"] {
                file.write_all(part).context(what)?;
            }
        }
        rustix::fs::fcntl_add_seals(&file, SEALS).map_err(std::io::Error::from).context(what)?;
        Ok(file.into())
    }

    /// Reads what [`Credentials::to_file`] has written.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for any other file; those of read(2).
    pub fn read(file: File) -> Result<Credentials> {
        let sealed = rustix::fs::fcntl_get_seals(&file);
        if !sealed.is_ok_and(|seals| seals.contains(SEALS)) {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "the credentials are not in a file that cordisk has made: this option is not for use by hand",
            ));
        }
        let mut bytes = Vec::new();
        file.take(LONGEST).read_to_end(&mut bytes).context(|| "credentials")?;
        let variables = bytes.split(|&byte| byte == 0).filter_map(|variable| {
            let equals = variable.iter().skip(1).position(|&byte| byte == b'=')? + 1;
            let (name, value) = variable.split_at(equals);
            Some((OsString::from_vec(name.to_vec()), OsString::from_vec(value[1..].to_vec())))
        });
        Ok(Credentials(variables.collect()))
    }
}

/// Whether a variable is for the fetcher alone. All that the clouds define are, because any of them
/// may be a secret by the next version of a cloud.
fn is_credential(name: &OsStr, value: &OsStr) -> bool {
    CLOUDS.iter().any(|cloud| name.as_encoded_bytes().starts_with(cloud))
        || PROXIES.iter().any(|proxy| name.eq_ignore_ascii_case(proxy))
            && value.as_encoded_bytes().contains(&b'@')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(list: &[(&str, &str)]) -> Credentials {
        Credentials::among(list.iter().map(|(name, value)| (name.into(), value.into())))
    }

    #[test]
    fn credentials_are_told_from_other_variables() {
        let found = variables(&[
            ("AWS_SECRET_ACCESS_KEY", "s"),
            ("PATH", "/usr/bin"),
            ("AZURE_CLIENT_SECRET", "s"),
            ("GOOGLE_APPLICATION_CREDENTIALS", "/key"),
            ("https_proxy", "http://proxy:3128"),
            ("HTTPS_PROXY", "http://user:s@proxy:3128"),
            ("LAWS_", "s"),
        ]);
        let names: Vec<_> = found.names().collect();
        let want = [
            "AWS_SECRET_ACCESS_KEY",
            "AZURE_CLIENT_SECRET",
            "GOOGLE_APPLICATION_CREDENTIALS",
            "HTTPS_PROXY",
        ];
        assert_eq!(names, want);
        assert!(!format!("{found:?}").contains("user:s"), "{found:?}");
    }

    #[test]
    fn they_are_read_as_they_were_written() {
        let strange = OsString::from_vec(b"a=b\n\xff".to_vec());
        let all = Credentials(vec![
            ("AWS_A".into(), strange),
            ("AWS_EMPTY".into(), OsString::new()),
            ("AWS_B".into(), "=".into()),
        ]);
        for credentials in [all, Credentials::default()] {
            let written = File::from(credentials.to_file().unwrap());
            let mut anew = File::open(format!("/proc/self/fd/{}", fd(&written))).unwrap();
            assert_eq!(Credentials::read(anew.try_clone().unwrap()).unwrap(), credentials);
            assert!(anew.write_all(b"x").is_err());
        }
    }

    fn fd(file: &File) -> i32 {
        std::os::fd::AsRawFd::as_raw_fd(file)
    }

    #[test]
    fn another_file_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(Credentials::read(file).unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
}
