//! The task API, as `ctr` uses it. Each test runs with runc's own shim, too, which tests the test.

use std::time::Instant;

use stillframe_integration::ctr::{self, Background, CtrError};
use stillframe_integration::{Container, Containerd, RUNC, binaries, skip};

stillframe_integration::with_both_runtimes!(
    exit_codes,
    a_command_that_is_not_there_is_named,
    exec_keeps_streams_apart,
    standard_input_ends,
    much_output_arrives_whole,
    a_terminal_is_a_terminal,
    signals_arrive,
    pause_stops_and_resume_goes_on,
    metrics_and_processes,
    delete_gives_the_exit_code,
    events_come_in_order,
    a_killed_shim_is_cleaned_up_after,
    many_at_once,
);

fn started<'a>(containerd: &'a Containerd, runtime: &str, arguments: &[&str]) -> Container<'a> {
    containerd
        .container("c")
        .runtime(runtime)
        .tmpfs("/scratch", "size=16m")
        .arguments(arguments)
        .start()
        .unwrap()
}

/// Kills and removes, and then nothing may be left.
fn removed(containerd: &Containerd, container: Container<'_>) {
    container.remove().unwrap();
    containerd.assert_nothing_left();
}

fn code(result: Result<ctr::Said, CtrError>) -> i32 {
    match result {
        Ok(_) => 0,
        Err(error) => error.code.unwrap_or_else(|| panic!("no exit code: {error}")),
    }
}

fn exit_codes(runtime: &str) {
    let containerd = Containerd::start().unwrap();
    for wanted in [0, 1, 7, 255] {
        let container =
            containerd.container("c").runtime(runtime).arguments(&["sh", "-c", &format!("exit {wanted}")]);
        assert_eq!(code(container.run()), wanted);
    }
    let container = started(&containerd, runtime, &["probe", "idle"]);
    assert_eq!(code(container.shell("exit 3")), 3);
    assert_eq!(code(container.shell("kill -9 $$")), 137);
    assert_eq!(code(container.shell("kill -15 $$")), 143);
    removed(&containerd, container);
}

fn a_command_that_is_not_there_is_named(runtime: &str) {
    let containerd = Containerd::start().unwrap();
    let error = containerd.container("c").runtime(runtime).arguments(&["no-such-command"]).run().unwrap_err();
    assert!(error.stderr.contains("no-such-command"), "{error}");
    containerd.assert_nothing_left();
    let container = started(&containerd, runtime, &["probe", "idle"]);
    let error = container.exec(&["neither-this"]).unwrap_err();
    assert!(error.stderr.contains("neither-this"), "{error}");
    // It is still of use.
    container.exec(&["true"]).unwrap();
    removed(&containerd, container);
}

fn exec_keeps_streams_apart(runtime: &str) {
    let containerd = Containerd::start().unwrap();
    let container = started(&containerd, runtime, &["probe", "idle"]);
    let said = container.shell("echo out; echo err >&2").unwrap();
    assert_eq!((said.stdout.as_str(), said.stderr.as_str()), ("out\n", "err\n"));
    let mut command =
        container.exec_command(&["--user", "1000:1000", "--cwd", "/tmp"], &["sh", "-c", "id -u; pwd"]);
    assert_eq!(ctr::run(&mut command).unwrap().stdout, "1000\n/tmp\n");
    removed(&containerd, container);
}

fn standard_input_ends(runtime: &str) {
    let containerd = Containerd::start().unwrap();
    let container = started(&containerd, runtime, &["probe", "idle"]);
    let mut cat = container.exec_background(&["cat"]).unwrap();
    cat.write(b"one\n").unwrap();
    cat.expect_line("the first line", |line| line == "one").unwrap();
    cat.write(b"two\n").unwrap();
    cat.expect_line("the second line", |line| line == "two").unwrap();
    let (status, _) = cat.wait().unwrap();
    assert_eq!(status, 0);
    // The same for the first process of a container. First ctr is seen to read its output: with runc's own shim, on a busy machine, it has
    // lost all that a program said which ended at once.
    let count = ["sh", "-c", "echo ready; exec wc -c"];
    let spec = containerd.container("cat").runtime(runtime).arguments(&count);
    let mut count = Background::start(&mut spec.command(&["--rm"])).unwrap();
    count.expect_line("that it runs", |line| line == "ready").unwrap();
    count.write(&[b'x'; 300_000]).unwrap();
    let (status, said) = count.wait().unwrap();
    assert_eq!((status, said.stdout.trim()), (0, "300000"));
    removed(&containerd, container);
}

fn much_output_arrives_whole(runtime: &str) {
    let containerd = Containerd::start().unwrap();
    let container = started(&containerd, runtime, &["probe", "idle"]);
    let said = container.shell("yes 0123456789abcde | head -n 500000; echo end >&2").unwrap();
    assert_eq!(said.stdout.len(), 500_000 * 16);
    assert_eq!(said.stderr, "end\n");
    removed(&containerd, container);
}

fn a_terminal_is_a_terminal(runtime: &str) {
    let Some(script) = binaries::find("script") else {
        skip::skipped("a_terminal_is_a_terminal", "script(1) isn't installed");
        return;
    };
    let containerd = Containerd::start().unwrap();
    let inside = "tty; n=0; until [ \"$(stty size)\" = '33 77' ]; do n=$((n+1)); [ $n -lt 200 ] || exit 9; \
                  usleep 20000; done; echo sized; read line; echo \"got $line\"; exit 6";
    let spec = containerd.container("tty").runtime(runtime).arguments(&["sh", "-c", inside]);
    let command = spec.command(&["--rm", "--tty"]);
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let quoted: Vec<_> =
        words.map(|word| format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"))).collect();
    let line = format!("stty rows 33 cols 77; {}", quoted.join(" "));
    let mut terminal = Background::start(std::process::Command::new(script).args([
        "--quiet",
        "--return",
        "--command",
        &line,
        "/dev/null",
    ]))
    .unwrap();
    terminal
        .expect_line("the terminal's name", |line| line.contains("/dev/pts/") || line == "/dev/console")
        .unwrap();
    terminal.expect_line("that the size has arrived", |line| line == "sized").unwrap();
    terminal.write(b"typed\n").unwrap();
    terminal.expect_line("what was typed", |line| line == "got typed").unwrap();
    assert_eq!(terminal.wait().unwrap().0, 6);
    containerd.assert_nothing_left();
}

fn signals_arrive(runtime: &str) {
    let containerd = Containerd::start().unwrap();
    let inside = "trap 'exit 42' TERM; echo ready; while :; do usleep 10000; done";
    let spec = containerd.container("c").runtime(runtime).arguments(&["sh", "-c", inside]);
    let mut foreground = Background::start(&mut spec.command(&["--rm"])).unwrap();
    foreground.expect_line("ready", |line| line == "ready").unwrap();
    let container = Container::attach(&containerd, spec.id().to_owned());
    let mut exec = Background::start(&mut container.exec_command(&[], &["sh", "-c", inside])).unwrap();
    exec.expect_line("ready", |line| line == "ready").unwrap();
    let exec_id = format!("{}-exec-1", container.id());
    containerd
        .ctr()
        .run(&["tasks", "kill", "--signal", "SIGTERM", "--exec-id", &exec_id, container.id()])
        .unwrap();
    assert_eq!(exec.wait().unwrap().0, 42);
    containerd.ctr().run(&["tasks", "kill", "--signal", "SIGTERM", container.id()]).unwrap();
    assert_eq!(foreground.wait().unwrap().0, 42);
    containerd.assert_nothing_left();
}

fn pause_stops_and_resume_goes_on(runtime: &str) {
    let containerd = Containerd::start().unwrap();
    let container = started(&containerd, runtime, &["probe", "idle"]);
    let mut meter = container.exec_background(&["probe", "pause-meter"]).unwrap();
    meter.expect_line("ready", |line| line == "ready").unwrap();
    containerd.ctr().run(&["tasks", "pause", container.id()]).unwrap();
    let paused = Instant::now();
    assert_eq!(container.status().unwrap().as_deref(), Some("PAUSED"));
    let at_least = paused.elapsed();
    containerd.ctr().run(&["tasks", "resume", container.id()]).unwrap();
    assert_eq!(container.status().unwrap().as_deref(), Some("RUNNING"));
    meter.write(b"\n").unwrap();
    let line = meter.expect_line("the pause", |line| line.starts_with("pause_ms=")).unwrap();
    let pause: f64 = line["pause_ms=".len()..].split(' ').next().unwrap().parse().unwrap();
    assert!(pause >= at_least.as_secs_f64() * 1e3, "{pause} ms of at least {at_least:?}");
    drop(meter);
    // Deleting a paused one must not hang.
    containerd.ctr().run(&["tasks", "pause", container.id()]).unwrap();
    containerd.ctr().run(&["tasks", "resume", container.id()]).unwrap();
    removed(&containerd, container);
}

fn metrics_and_processes(runtime: &str) {
    let containerd = Containerd::start().unwrap();
    let container = started(&containerd, runtime, &["probe", "idle"]);
    let metrics = containerd.ctr().run(&["tasks", "metrics", container.id()]).unwrap().stdout;
    assert!(metrics.contains("memory.usage"), "{metrics}");
    let mut exec = container.exec_background(&["probe", "pause-meter"]).unwrap();
    exec.expect_line("ready", |line| line == "ready").unwrap();
    let listed = containerd.ctr().run(&["tasks", "ps", container.id()]).unwrap().stdout;
    let pids: Vec<i32> =
        listed.lines().skip(1).map(|line| line.split_whitespace().next().unwrap().parse().unwrap()).collect();
    assert_eq!(pids.len(), 2, "{listed}");
    let init = container.pid().unwrap().unwrap();
    assert!(pids.contains(&init), "{init} isn't in {listed}");
    for pid in pids {
        let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        assert!(exe.ends_with("bin/probe"), "{}", exe.display());
    }
    drop(exec);
    removed(&containerd, container);
}

fn delete_gives_the_exit_code(runtime: &str) {
    let containerd = Containerd::start().unwrap();
    let container = started(&containerd, runtime, &["sh", "-c", "exit 5"]);
    container.await_status("STOPPED").unwrap();
    let error = containerd.ctr().run(&["tasks", "kill", container.id()]).map(|_| ()).err();
    assert!(error.is_some(), "a stopped task can't be killed");
    let said = containerd.ctr().run(&["tasks", "delete", container.id()]).unwrap();
    assert!(said.stderr.contains("exit code 5"), "{said:?}");
    containerd.ctr().run(&["containers", "delete", container.id()]).unwrap();
    containerd.assert_nothing_left();
    // A running one isn't deleted without force, and with it gives the signal.
    let container = started(&containerd, runtime, &["probe", "idle"]);
    let error = containerd.ctr().run(&["tasks", "delete", container.id()]).unwrap_err();
    assert!(error.stderr.contains("must be stopped"), "{error}");
    assert_eq!(container.status().unwrap().as_deref(), Some("RUNNING"));
    removed(&containerd, container);
}

fn events_come_in_order(runtime: &str) {
    let containerd = Containerd::start().unwrap();
    let mut events = Background::start(&mut containerd.ctr().command(&["events"])).unwrap();
    // The subscription has begun when this event arrives; before that nothing is waited for.
    let mut tries = 0;
    loop {
        tries += 1;
        let image = format!("stillframe.test/tag:{tries}");
        containerd.ctr().run(&["images", "tag", stillframe_integration::image::NAME, &image]).unwrap();
        if tries >= 3 {
            events.expect_line("an event", |line| line.contains("/images/create")).unwrap();
            break;
        }
    }
    let container = started(
        &containerd,
        runtime,
        &["sh", "-c", "until read line < /scratch/fifo; do usleep 9000; done 2>/dev/null; exit 4"],
    );
    // When the first process ends it takes this one with it, at its end or shortly before.
    let told = code(container.shell("mkfifo /scratch/fifo; echo go > /scratch/fifo"));
    assert!(told == 0 || told == 137, "{told}");
    let id = container.id().to_owned();
    container.await_status("STOPPED").unwrap();
    containerd.ctr().run(&["tasks", "delete", &id]).unwrap();
    let mut seen = Vec::new();
    while seen.last().is_none_or(|(topic, _): &(String, serde_json::Value)| topic != "/tasks/delete") {
        let line = events.expect_line("a task's event", |line| line.contains(" /tasks/")).unwrap();
        let (head, body) = line.split_at(line.find('{').unwrap());
        let topic = head.split_whitespace().find(|word| word.starts_with("/tasks/")).unwrap().to_owned();
        seen.push((topic, serde_json::from_str(body).unwrap()));
    }
    let topics: Vec<&str> = seen.iter().map(|(topic, _)| topic.as_str()).collect();
    assert_eq!(topics.first(), Some(&"/tasks/create"));
    let exit_of = |id: &str| {
        seen.iter()
            .position(|(topic, body)| topic == "/tasks/exit" && body["id"] == id)
            .unwrap_or_else(|| panic!("{seen:?}"))
    };
    let place =
        |topic: &str| topics.iter().position(|one| *one == topic).unwrap_or_else(|| panic!("{topics:?}"));
    assert!(place("/tasks/create") < place("/tasks/start"));
    assert!(place("/tasks/start") < exit_of(&id));
    assert!(exit_of(&id) < place("/tasks/delete"));
    let exec = format!("{id}-exec-1");
    assert!(place("/tasks/exec-added") < place("/tasks/exec-started"));
    assert!(place("/tasks/exec-started") < exit_of(&exec));
    assert_eq!(seen[exit_of(&id)].1["exit_status"], 4);
    for (topic, body) in seen.iter().filter(|(topic, _)| topic == "/tasks/exit" || topic == "/tasks/delete") {
        let at = body["exited_at"].as_str().unwrap_or_else(|| panic!("{topic} without a time: {body}"));
        assert!(at.starts_with("20"), "{topic}: {at}");
    }
    containerd.ctr().run(&["containers", "delete", &id]).unwrap();
}

fn a_killed_shim_is_cleaned_up_after(runtime: &str) {
    let containerd = Containerd::start().unwrap();
    let container = started(&containerd, runtime, &["probe", "idle"]);
    let shims = containerd.shims();
    assert_eq!(shims.len(), 1, "{shims:?}");
    let shim = nix::unistd::Pid::from_raw(shims[0].pid);
    nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGKILL).unwrap();
    // containerd sees the closed connection and has the shim's binary delete what is left.
    let gone = |wanted: &[Option<&str>]| {
        let end = Instant::now() + ctr::DEADLINE / 6;
        loop {
            let status = container.status().unwrap();
            if wanted.contains(&status.as_deref()) {
                return;
            }
            assert!(Instant::now() < end, "the task is {status:?}");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    };
    gone(&[None, Some("STOPPED"), Some("UNKNOWN")]);
    if container.status().unwrap().is_some() {
        // What it says of a task without a shim differs from version to version; only what is left counts.
        let _ = containerd.ctr().run(&["tasks", "delete", "--force", container.id()]);
    }
    containerd.ctr().run(&["containers", "delete", container.id()]).unwrap();
    if runtime == RUNC {
        // This one is better with ours: runc's shim leaves its socket.
        containerd.shim_sockets().iter().for_each(|path| std::fs::remove_file(path).unwrap());
    }
    containerd.assert_nothing_left();
    // And the id can be used again.
    let container = started(&containerd, runtime, &["probe", "idle"]);
    container.exec(&["true"]).unwrap();
    removed(&containerd, container);
}

fn many_at_once(runtime: &str) {
    let containerd = Containerd::start().unwrap();
    std::thread::scope(|scope| {
        for index in 0..4 {
            let containerd = &containerd;
            scope.spawn(move || {
                let container = containerd
                    .container(&format!("c{index}"))
                    .runtime(runtime)
                    .tmpfs("/scratch", "size=8m")
                    .start()
                    .unwrap();
                std::thread::scope(|scope| {
                    for exec in 0..3 {
                        let mut command = container
                            .exec_command(&[], &["sh", "-c", &format!("echo {exec} > /scratch/{exec}")]);
                        scope.spawn(move || ctr::run(&mut command).unwrap());
                    }
                });
                assert_eq!(container.shell("cat /scratch/*").unwrap().stdout, "0\n1\n2\n");
                container.remove().unwrap();
            });
        }
    });
    containerd.assert_nothing_left();
}
