//! Running other programs: quietly with their output kept for the error message, with a time limit,
//! or in this program's place.
//!
//! Owns how a failure of a child is worded. Must not know what the children are for.

use std::ffi::OsString;
use std::io::Read;
use std::path::Path;
use std::process::{Command, ExitCode, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use wait4::Wait4;

/// The command as a user would type it.
pub fn shown(cmd: &Command) -> String {
    let quote = |s: &std::ffi::OsStr| {
        let s = s.to_string_lossy().into_owned();
        if s.is_empty() || s.contains([' ', '\'', '"', '$', '(', ';']) {
            format!("'{}'", s.replace('\'', "'\\''"))
        } else {
            s
        }
    };
    let words: Vec<_> = std::iter::once(cmd.get_program()).chain(cmd.get_args()).map(quote).collect();
    words.join(" ")
}

/// The last `n` lines of a text.
pub fn tail(text: &str, n: usize) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(n)..].join("\n")
}

/// Runs a command without input; on failure the error has the command and the end of its output.
pub fn output(cmd: &mut Command) -> Result<Output> {
    let out = cmd.stdin(Stdio::null()).output().with_context(|| format!("cannot run `{}`", shown(cmd)))?;
    judged(cmd, out)
}

fn judged(cmd: &Command, out: Output) -> Result<Output> {
    if !out.status.success() {
        let text = [out.stdout.as_slice(), out.stderr.as_slice()].concat();
        bail!("`{}` failed ({}):\n{}", shown(cmd), out.status, tail(&String::from_utf8_lossy(&text), 40));
    }
    Ok(out)
}

fn trimmed(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).trim().to_string()
}

/// Runs a command for its standard output, as text without surrounding space.
pub fn text(cmd: &mut Command) -> Result<String> {
    Ok(trimmed(&output(cmd)?))
}

/// As [`text`], and the most memory that the process held at once, in bytes, where the system tells: no less than this process held when it started it.
pub fn text_and_memory(cmd: &mut Command) -> Result<(String, Option<u64>)> {
    let run = |cmd: &mut Command| {
        let mut child = cmd.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let (mut out, mut err, mut stderr) = (vec![], vec![], child.stderr.take());
        std::thread::scope(|s| {
            // Whichever pipe is not read fills up, and the child waits.
            let other = s.spawn(|| stderr.as_mut().map_or(Ok(0), |pipe| pipe.read_to_end(&mut err)));
            let read = child.stdout.as_mut().map_or(Ok(0), |pipe| pipe.read_to_end(&mut out));
            read.and(other.join().unwrap_or(Ok(0)))
        })?;
        let end = child.wait4()?;
        Ok::<_, std::io::Error>((Output { status: end.status, stdout: out, stderr: err }, end.rusage.maxrss))
    };
    let (out, most) = run(cmd).with_context(|| format!("cannot run `{}`", shown(cmd)))?;
    Ok((trimmed(&judged(cmd, out)?), (most > 0).then_some(most)))
}

/// Whether a command ends successfully within a time limit; its output is dropped.
pub fn succeeds(cmd: &mut Command, limit: Duration) -> bool {
    let child = cmd.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let Ok(mut child) = child else { return false };
    let end = Instant::now() + limit;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return status.success(),
            Ok(None) if Instant::now() < end => sleep(Duration::from_millis(20)),
            _ => {
                // It may have ended by itself in the meantime: nothing to do about either failure.
                let _ = child.kill();
                let _ = child.wait();
                return false;
            }
        }
    }
}

/// Whether a program of this name can be run; `args` must make it end at once.
pub fn runs(program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> bool {
    succeeds(Command::new(program).args(args), Duration::from_secs(30))
}

/// Runs a program in this one's place: the same terminal, the same exit code.
pub fn hand_over(program: &Path, args: &[OsString]) -> Result<ExitCode> {
    let mut cmd = Command::new(program);
    cmd.args(args);
    become_it(&mut cmd).with_context(|| format!("cannot run `{}`", shown(&cmd)))
}

#[cfg(unix)]
fn become_it(cmd: &mut Command) -> std::io::Result<ExitCode> {
    use std::os::unix::process::CommandExt;
    Err(cmd.exec())
}

#[cfg(not(unix))]
fn become_it(cmd: &mut Command) -> std::io::Result<ExitCode> {
    let code = cmd.status()?.code().unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_the_command_and_its_output() {
        let e = output(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).err().unwrap().to_string();
        assert!(e.contains("sh -c 'echo why >&2; exit 3'") && e.contains("why") && e.contains('3'), "{e}");
    }

    #[test]
    fn memory_is_that_of_the_child_and_output_of_any_length_is_read() {
        let many = |to: &str| format!("i=0; while [ $i -lt 20000 ]; do echo 0123456789 {to}; i=$((i+1)); done");
        let small = text_and_memory(Command::new("sh").args(["-c", &format!("{}; {}", many(""), many(">&2"))])).unwrap();
        assert_eq!(small.0.lines().count(), 20000);
        let large = text_and_memory(Command::new("sh").args(["-c", "x=$(head -c 300000000 /dev/zero | tr '\\0' x); echo ${#x}"])).unwrap();
        assert_eq!(large.0, "300000000");
        if cfg!(target_os = "linux") {
            let most = [small.1, large.1].map(Option::unwrap);
            // What this process holds counts as well: it is the child until that becomes the program.
            assert!(most[0] < 250_000_000 && most[1] > 300_000_000, "{most:?}");
        }
        let e = text_and_memory(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).err().unwrap().to_string();
        assert!(e.contains("why") && e.contains('3'), "{e}");
    }

    #[test]
    fn a_slow_command_is_stopped() {
        let start = Instant::now();
        assert!(!succeeds(Command::new("sleep").arg("20"), Duration::from_millis(50)));
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(runs("true", &[]) && !runs("no-such-program-here", &[]));
    }

    #[test]
    fn tail_keeps_the_end() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a", 9), "a");
    }
}
