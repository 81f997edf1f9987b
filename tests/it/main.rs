//! The integration tests, as one binary, so that they are linked once.
//!
//! The tests check the promises (docs/invariants.md) from outside: through the mount, the socket,
//! the command line, and QEMU's tools. `CORDISK_SEED=N` repeats a random test. `CORDISK_KEEP=1`
//! keeps the scratch directories. `CORDISK_TEST_ACCEL=tcg` (or `kvm`) chooses the accelerator of
//! QEMU's guests, `CORDISK_TEST_TRANSPORT=uring` the transport of requests. `CI=true` or
//! `CORDISK_REQUIRE_ALL=1` makes a missing tool a failure instead of a skip.
#![allow(clippy::single_range_in_vec_init)] // lists of ranges are what these tests compare; a list of one is no mistake

#[macro_use]
mod support;

mod after_death;
mod allocated_ahead;
mod architecture;
mod bad_disk;
mod bad_input;
mod changed_base;
mod check_command;
mod check_differential;
mod client_commands;
mod closing;
mod confinement;
mod discard_granularity;
mod documents;
mod examples;
mod fio_verify;
mod foreign_image;
mod forgetful_host;
mod full_file_system;
mod full_host;
mod fuse_end_to_end;
mod hazards;
mod hostile_image;
mod hung_backing;
mod image_interop;
mod inferred_content;
mod invariants;
mod kill_restart;
mod language;
mod log;
mod lower_power_cut;
mod map_differential;
mod mapped_pages;
mod metrics;
mod mount_helper;
mod on_complete;
mod order;
mod order_files;
mod order_mount;
mod qmp_client;
mod qmp_error_policy;
mod qmp_facts;
mod qmp_shell;
mod qmp_stress;
mod qmp_transcripts;
mod readme;
mod real_file_systems;
mod real_guest;
mod reflink;
mod release_log;
mod remote;
mod resume;
mod schedule;
mod service;
mod service_store;
mod service_unit;
mod small_limits;
mod stream_qmp;
mod takeover;
mod takeover_jobs;
mod torture;
mod transports;
mod upgrade;
mod uring_faults;
mod views;
