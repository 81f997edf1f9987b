//! The `cordisk` program: see the library crate for the map.

fn main() -> std::process::ExitCode {
    cordisk::daemon::main()
}
