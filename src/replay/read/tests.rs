use std::time::Duration;

use serde_json::json;

use super::*;
use crate::replay::generate::{generate, to_csv};
use crate::store::Activity;

fn one(at_ms: u64, model: &str, service_ms: u64) -> Arrival {
    Arrival { at: Time(at_ms), model: model.into(), service: Duration::from_millis(service_ms) }
}

fn error(text: &str) -> String {
    parse("day.csv", text.as_bytes()).expect_err(text).to_string()
}

#[test]
fn columns_are_found_by_their_names() {
    let text = "\u{feff}service_s, note ,model,arrival_s\r\n\r\n\
                2.5,x,\"b, \"\"c\"\"\",13.25\r\n  \r\n1,,a,10\r\n0.0004,,é,13.25\n";
    let trace = parse("day.csv", text.as_bytes());
    let sorted = vec![one(0, "a", 1000), one(3250, "b, \"c\"", 2500), one(3250, "é", 0)];
    assert_eq!(trace, Ok(sorted), "those of one moment stay in the file's order");
}

#[test]
fn what_is_written_is_read() {
    let mut trace = generate(3, 2000);
    let first = trace[0].at.0;
    let csv = to_csv(&trace);
    trace.iter_mut().for_each(|arrival| arrival.at = Time(arrival.at.0 - first));
    assert_eq!(parse("day.csv", csv.as_bytes()), Ok(trace));
}

#[test]
fn errors_of_csv_name_the_place_and_what_was_expected() {
    const HEADER: &str = "arrival_s,model,service_s\n";
    let header = "expected the header arrival_s,model,service_s or activity in JSON";
    assert_eq!(error(" \n"), format!("day.csv: {header}, found nothing"));
    assert_eq!(
        error("\nmodel,service_s\n"),
        format!("day.csv:2, arrival_s: {header}, found \"model,service_s\"")
    );
    assert_eq!(
        error("arrival_s,model,service_s,model\n"),
        "day.csv:1, model: expected the column once, found it twice"
    );
    let none = "day.csv: expected at least one request that was served, found none";
    assert_eq!(error(HEADER), none);
    let long = "m".repeat(300);
    for (row, expected) in [
        ("1,a", "day.csv:3: expected 3 fields, as in the header, found 2"),
        ("1,,2", "day.csv:3, model: expected the name of a model, found nothing"),
        ("x,a,2", "day.csv:3, arrival_s: expected seconds from 0 to 10000000000, found \"x\""),
        ("-1,a,2", "day.csv:3, arrival_s: expected seconds from 0 to 10000000000, found \"-1\""),
        ("1,a,nan", "day.csv:3, service_s: expected seconds from 0 to 2592000, found \"nan\""),
        ("1,a,1e400", "day.csv:3, service_s: expected seconds from 0 to 2592000, found \"1e400\""),
        ("1,a,", "day.csv:3, service_s: expected seconds from 0 to 2592000, found nothing"),
        ("1,\"a,2", "day.csv:3: expected a closing \" on the same line, found none"),
        ("1,\"a\"b,2", "day.csv:3: expected a comma after a quoted field, found \"b,2\""),
        (
            &format!("1,{long},2"),
            "day.csv:3, model: expected a name of 256 bytes at most, found 300",
        ),
        (
            &format!("1,a,{}", "1".repeat(5000)),
            "day.csv:3: expected a line of 4096 bytes at most, found 5004",
        ),
    ] {
        assert_eq!(error(&format!("{HEADER}0,a,1\n{row}\n")), expected);
    }
    let error = parse("day.csv", b"arrival_s,model,service_s\n1,\xff,2\n").expect_err("bytes");
    assert_eq!(error.to_string(), "day.csv:2: expected text in UTF-8, found other bytes");
    assert_eq!(error.line, Some(2));
}

#[test]
fn a_file_that_is_not_there_or_too_large_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("none.csv");
    let error = read(&path).expect_err("no file").to_string();
    assert!(error.starts_with(&format!("{}: cannot be read: ", path.display())), "{error}");
    // Zeros that take no room on disk.
    let file = File::create(&path).expect("a file");
    file.set_len(FILE_BYTES_MAX + 1).expect("room");
    let error = read(&path).expect_err("too large");
    assert_eq!(error.problem, "expected 256 MiB at most, found more");
}

#[test]
fn so_many_arrivals_and_no_more() {
    let csv = to_csv(&generate(1, 20));
    assert!(parsed(csv.as_bytes(), 20).is_ok_and(|trace| trace.len() == 20));
    let problem = parsed(csv.as_bytes(), 19).expect_err("too many");
    let expected = (Some(21), "expected 19 arrivals at most, found more");
    assert_eq!((problem.line, problem.problem.as_str()), expected);
    let row = serde_json::to_string(&row(1000, "a", 0, 1, 200)).expect("JSON");
    for text in [format!("[{row},\n{row}]"), format!("{row}\n{row}")] {
        assert_eq!(parsed(text.as_bytes(), 1).expect_err("too many").line, Some(2), "{text}");
    }
}

fn row(
    arrived_unix_ms: u64,
    model: &str,
    queue_ms: u64,
    duration_ms: u64,
    status: u16,
) -> Activity {
    let model = model.into();
    Activity { arrived_unix_ms, model, queue_ms, duration_ms, status, ..Activity::default() }
}

fn history() -> Vec<Activity> {
    vec![
        // The order of their ends.
        row(1_767_268_802_000, "coder", 0, 1500, 200),
        row(1_767_268_800_000, "planner", 40_000, 43_000, 200),
        row(1_767_268_799_000, "planner", 0, 60_000, 503),
        row(1_767_268_798_000, "", 0, 3, 404),
    ]
}

fn expected() -> Result<Vec<Arrival>, ReadError> {
    Ok(vec![one(0, "planner", 3000), one(2000, "coder", 1500)])
}

#[test]
fn rows_of_the_store_are_read() {
    let rows: Vec<String> =
        history().iter().map(|row| serde_json::to_string(row).expect("JSON")).collect();
    assert_eq!(parse("rows", format!("\n{}\n\n", rows.join("\n")).as_bytes()), expected());
    assert_eq!(parse("rows", format!(" [{}]", rows.join(",\n")).as_bytes()), expected());
}

#[test]
fn errors_of_activity_name_the_row_s_line_and_the_key() {
    let good = json!({"model": "a", "status": 200, "arrived_unix_ms": 5, "queue_ms": 0,
        "duration_ms": 10});
    let lacking = |key: &str| {
        let mut row = good.clone();
        row.as_object_mut().expect("an object").remove(key);
        row
    };
    let mut late = good.clone();
    late["queue_ms"] = json!(11);
    let mut odd = lacking("arrived_unix_ms");
    odd["timestamp"] = json!("noon");
    for (row, expected) in [
        (lacking("model"), "2, model: expected the name of a model, found nothing"),
        (lacking("status"), "2, status: expected the status of the answer, found nothing"),
        (lacking("queue_ms"), "2, queue_ms: expected milliseconds, found nothing"),
        (lacking("duration_ms"), "2, duration_ms: expected milliseconds, found nothing"),
        (
            lacking("arrived_unix_ms"),
            "2, timestamp: expected the time of the request's end, found nothing",
        ),
        (late, "2, queue_ms: expected duration_ms (10) at most, found 11"),
        (odd, "2, timestamp: expected a time as 2026-01-31T12:00:00Z, found \"noon\""),
    ] {
        assert_eq!(error(&format!("{good}\n{row}\n")), format!("day.csv:{expected}"));
        assert_eq!(error(&format!("[{good},\n{row}\n]")), format!("day.csv:{expected}"));
    }
    let broken = error(&format!("{good}\n{{\"model\": 5}}\n"));
    assert!(
        broken.starts_with("day.csv:2: expected rows of activity in JSON: invalid type"),
        "{broken}"
    );
    let cut = error(&format!("[{good},\n{{\"model\":"));
    assert!(cut.starts_with("day.csv:2: expected rows of activity in JSON: EOF"), "{cut}");
}
