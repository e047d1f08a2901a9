//! `kubectl exec`: a command in a container with its streams over the network, by containerd's streaming server, with and without a
//! terminal. By WebSocket, with the protocol that the servers of all containerds speak. It can't end standard input alone, which
//! later ones can: the API server's business, that speaks SPDY with containerd then.

use std::net::TcpStream;

use stillframe_cri::api::ExecRequest;
use stillframe_cri::{Cri, PodContainer};
use stillframe_integration::ContainerdVersion;
use tungstenite::client::IntoClientRequest;
use tungstenite::{Message, WebSocket};

stillframe_integration::with_every_containerd!(a_command_has_its_streams_and_its_terminal);

const PROTOCOL: &str = "v4.channel.k8s.io";
/// Its channels: the first byte of each message.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;

/// A command that runs.
struct Exec(WebSocket<TcpStream>);

impl Exec {
    fn start(cri: &Cri, container: &PodContainer<'_>, tty: bool, command: &[&str]) -> Self {
        let request = ExecRequest {
            container_id: container.id().to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        let answer = cri.call("Exec", |mut cri| async move { cri.exec(request).await }).unwrap();
        let address = answer.url.strip_prefix("http://").unwrap();
        let stream = TcpStream::connect(address.split('/').next().unwrap()).unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
        let mut request = format!("ws://{address}").into_client_request().unwrap();
        request.headers_mut().insert("Sec-WebSocket-Protocol", PROTOCOL.parse().unwrap());
        Self(tungstenite::client(request, stream).unwrap().0)
    }

    fn send(&mut self, channel: u8, bytes: &[u8]) {
        self.0.send(Message::binary([&[channel], bytes].concat())).unwrap();
    }

    /// Standard output, standard error and status, when it has ended.
    fn end(mut self) -> (String, String, serde_json::Value) {
        let mut said = [const { Vec::new() }; 4];
        while said[usize::from(STATUS)].is_empty() {
            match self.0.read().unwrap() {
                Message::Binary(bytes) if !bytes.is_empty() => {
                    said[usize::from(bytes[0])].extend(&bytes[1..])
                }
                Message::Close(_) => break,
                _ => {}
            }
        }
        let text = |channel: u8| String::from_utf8(said[usize::from(channel)].clone()).unwrap();
        (text(STDOUT), text(STDERR), serde_json::from_str(&text(STATUS)).unwrap())
    }
}

#[track_caller]
fn code(status: &serde_json::Value) -> &str {
    assert_eq!(status["details"]["causes"][0]["reason"], "ExitCode", "{status}");
    status["details"]["causes"][0]["message"].as_str().unwrap()
}

fn a_command_has_its_streams_and_its_terminal(version: &ContainerdVersion) {
    let cri = Cri::start(version).unwrap();
    let pod = cri.pod("pod").run().unwrap();
    let container = pod.container("only").start().unwrap();

    let mut exec =
        Exec::start(&cri, &container, false, &["sh", "-c", "read x; echo got $x; echo err >&2; exit 3"]);
    exec.send(STDIN, b"hello\n");
    let (out, err, status) = exec.end();
    assert_eq!((out.as_str(), err.as_str(), code(&status)), ("got hello\n", "err\n", "3"));

    let much = Exec::start(&cri, &container, false, &["head", "-c", "3000000", "/dev/zero"]);
    let (out, _, status) = much.end();
    assert_eq!((out.len(), status["status"].as_str()), (3_000_000, Some("Success")));

    let mut exec = Exec::start(&cri, &container, true, &["sh"]);
    exec.send(RESIZE, br#"{"Width":97,"Height":31}"#);
    // The size may come after the question, so that is asked until it has.
    exec.send(STDIN, b"tty; until stty size | grep '31 97'; do usleep 10000; done; exit 4\r");
    let (out, _, status) = exec.end();
    assert!(out.contains("/dev/pts/") && out.contains("\n31 97\r\n"), "{out:?}");
    assert_eq!(code(&status), "4");

    pod.remove().unwrap();
    cri.containerd().assert_nothing_left();
    cri.stop().unwrap();
}
