//! (to be written)

/// Parses the command line, runs the command, returns the exit status.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
