//! `GET /events`: what happens, told in order, and again to whoever was cut off.

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use support::{World, gpu, serve, standin};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
struct Event {
    id: String,
    kind: String,
    data: Value,
}

/// A reader of the stream, as a client with a socket has it.
struct Reader {
    stream: TcpStream,
    text: String,
}

impl Reader {
    async fn open(world: &World, last_id: Option<&str>) -> Reader {
        let address = world.server.talk.orchestrator.trim_start_matches("http://").to_owned();
        let mut stream = TcpStream::connect(&address).await.expect("a connection");
        let last_id = last_id.map_or(String::new(), |id| format!("Last-Event-ID: {id}\r\n"));
        let ask = format!("GET /events HTTP/1.1\r\nHost: {address}\r\n{last_id}\r\n");
        stream.write_all(ask.as_bytes()).await.expect("asked");
        let mut reader = Reader { stream, text: String::new() };
        reader.until(|text| text.contains("\r\n\r\n")).await;
        assert!(reader.text.starts_with("HTTP/1.1 200"), "{}", reader.text);
        assert!(reader.text.contains("content-type: text/event-stream"), "{}", reader.text);
        reader
    }

    async fn until(&mut self, wanted: impl Fn(&str) -> bool) {
        let more = async {
            while !wanted(&self.text) {
                let mut bytes = [0; 4096];
                let read = self.stream.read(&mut bytes).await.expect("it lives");
                assert!(read > 0, "the stream ended: {}", self.text);
                self.text.push_str(&String::from_utf8_lossy(&bytes[..read]));
            }
        };
        if tokio::time::timeout(PATIENCE, more).await.is_err() {
            panic!("never came: {}", self.text);
        }
    }

    /// Events so far. Each chunk of the transfer holds whole lines.
    fn events(&self) -> Vec<Event> {
        let blocks = self.text.split("\n\n").filter(|block| block.contains("event: "));
        let parsed = blocks.map(|block| {
            let field = |name: &str| {
                let line = block.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap_or_default().to_owned()
            };
            let data = serde_json::from_str(&field("data: ")).expect(block);
            Event { id: field("id: "), kind: field("event: "), data }
        });
        parsed.collect()
    }
}

fn kinds_of<'a>(events: &'a [Event], model: &str) -> Vec<(&'a str, &'a str)> {
    let of_model = events.iter().filter(|event| event.data["model"] == model);
    let told = of_model.map(|event| {
        let word = ["state", "phase", "result"].iter().find_map(|key| event.data[key].as_str());
        (event.kind.as_str(), word.unwrap_or_default())
    });
    told.collect()
}

// contract: GET /events
#[tokio::test]
async fn a_swap_is_told_in_order_and_a_reader_goes_on_where_it_was_cut_off() {
    let models = standin("ada", "14GiB", "--load 100ms") + &standin("bob", "14GiB", "--load 100ms");
    let world = serve(&gpu("24GiB", "50ms"), &models, &[]).await;
    let mut first = Reader::open(&world, None).await;
    for model in ["ada", "bob"] {
        world.server.talk.chat(model, false, &[]).await.expect("an answer");
    }
    let two_ended = |text: &str| text.matches("\"result\":\"ready\"").count() == 2;
    first.until(two_ended).await;
    first
        .until(|text| text.matches("event: activity").count() == 2 && text.ends_with("\r\n"))
        .await;
    let events = first.events();
    let of_ada = kinds_of(&events, "ada");
    assert_eq!(of_ada[0], ("swap_began", ""), "{of_ada:?}");
    let place = |wanted: (&str, &str)| {
        let place = of_ada.iter().position(|told| *told == wanted);
        place.unwrap_or_else(|| panic!("no {wanted:?} in {of_ada:?}"))
    };
    assert!(place(("swap_phase", "start")) < place(("model_state", "ready")), "{of_ada:?}");
    assert!(place(("model_state", "ready")) <= place(("swap_ended", "ready")) + 1, "{of_ada:?}");
    assert_eq!(of_ada.last(), Some(&("model_state", "stopped")), "it made room: {of_ada:?}");
    let began =
        events.iter().find(|event| event.kind == "swap_began" && event.data["model"] == "bob");
    assert_eq!(began.expect("told").data["cause"], "request");
    let activity: Vec<&Value> = events
        .iter()
        .filter(|event| event.kind == "activity")
        .map(|event| &event.data["id"])
        .collect();
    assert_eq!(activity, [&json!(1), &json!(2)]);

    // Cut off after the fourth event: the fifth comes next, and nothing twice.
    drop(first);
    let mut again = Reader::open(&world, Some(&events[3].id)).await;
    let last = events.last().expect("events").id.clone();
    again.until(|text| text.contains(&format!("id: {last}\n"))).await;
    let ids: Vec<String> = again.events().into_iter().map(|event| event.id).collect();
    let expected: Vec<String> = events[4..].iter().map(|event| event.id.clone()).collect();
    assert_eq!(ids[..expected.len()], expected);

    // Of a run before this one: told so, and given all that is kept.
    let mut stranger = Reader::open(&world, Some("abc-1")).await;
    stranger.until(|text| text.contains(&format!("id: {last}\n"))).await;
    let told = stranger.events();
    assert_eq!(told[0].kind, "missed");
    let first = told.iter().position(|event| event.id == events[0].id).expect("kept");
    assert_eq!(kinds_of(&told[first..], "bob")[..3], kinds_of(&events, "bob")[..3]);
    world.stop().await;
}

#[tokio::test]
async fn open_streams_do_not_hold_up_the_end() {
    let world = serve(&gpu("24GiB", "50ms"), &standin("ada", "14GiB", ""), &[]).await;
    let reader = Reader::open(&world, None).await;
    let began = std::time::Instant::now();
    world.stop().await;
    // `swap.shutdown_timeout` is a minute.
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    drop(reader);
}
