//! One operation of the document, and the short words in which schemas are written.

use serde_json::{Map, Value, json};

use crate::api::guard::Needs;

/// Who tells of itself by which name in `#/components/schemas`.
pub type Fields = [(&'static str, &'static str, &'static str)];

/// An object: field, kind, meaning. A field that may be missing ends in `?`. Kinds are `string`,
/// `integer`, `natural`, `number`, `boolean`, `object`, `any`, `time`, `name` (of a model), `a|b` (one of these
/// words), `#Name` (another schema), `[kind]`, `{kind}` (by any key), and `kind?`: or null.
pub fn object(fields: &Fields) -> Value {
    let mut properties = Map::new();
    let mut required = Vec::new();
    for (field, kind, meaning) in fields {
        let name = field.trim_end_matches('?');
        if name == *field {
            required.push(name);
        }
        let mut schema = schema(kind);
        if !meaning.is_empty() {
            schema["description"] = json!(meaning);
        }
        properties.insert(name.to_owned(), schema);
    }
    json!({ "type": "object", "required": required, "properties": properties })
}

pub fn schema(kind: &str) -> Value {
    if let Some(kind) = kind.strip_suffix('?') {
        return json!({ "anyOf": [schema(kind), { "type": "null" }] });
    }
    let inside = |open, close| kind.strip_prefix(open)?.strip_suffix(close);
    if let Some(kind) = inside('[', ']') {
        return json!({ "type": "array", "items": schema(kind) });
    }
    if let Some(kind) = inside('{', '}') {
        return json!({ "type": "object", "additionalProperties": schema(kind) });
    }
    if let Some(name) = kind.strip_prefix('#') {
        return json!({ "$ref": format!("#/components/schemas/{name}") });
    }
    if kind.contains('|') {
        return json!({ "type": "string", "enum": kind.split('|').collect::<Vec<_>>() });
    }
    match kind {
        "any" => json!({}),
        "time" => json!({ "type": "string", "format": "date-time" }),
        "name" => json!({ "type": "string", "minLength": 1, "format": "model-name" }),
        "natural" => json!({ "type": "integer", "minimum": 0 }),
        kind => json!({ "type": kind }),
    }
}

#[derive(Clone, Debug)]
pub struct Op {
    pub method: &'static str,
    /// As documented: `/models/{name}/load`.
    pub path: &'static str,
    /// As in the table of routes: `/models/{*name}`.
    pub route: &'static str,
    pub tag: &'static str,
    summary: &'static str,
    queries: Vec<Value>,
    body: Option<Value>,
    answers: Vec<(String, Value)>,
}

pub fn get(path: &'static str, summary: &'static str) -> Op {
    Op::new("GET", path, summary)
}

pub fn post(path: &'static str, summary: &'static str) -> Op {
    Op::new("POST", path, summary)
}

/// All of one topic.
pub fn tagged(tag: &'static str, ops: Vec<Op>) -> Vec<Op> {
    ops.into_iter().map(|op| Op { tag, ..op }).collect()
}

impl Op {
    pub fn new(method: &'static str, path: &'static str, summary: &'static str) -> Op {
        let (queries, answers) = (Vec::new(), Vec::new());
        Op { method, path, route: path, tag: "", summary, queries, body: None, answers }
    }

    /// The row of the table, where it is a wildcard.
    pub fn at(self, route: &'static str) -> Op {
        Op { route, ..self }
    }

    pub fn query(mut self, name: &str, kind: &str, meaning: &str) -> Op {
        self.queries.push(json!({
            "name": name, "in": "query", "required": false, "schema": schema(kind),
            "description": meaning,
        }));
        self
    }

    pub fn header(mut self, name: &str, kind: &str, meaning: &str) -> Op {
        self.queries.push(json!({
            "name": name, "in": "header", "required": false, "schema": schema(kind),
            "description": meaning,
        }));
        self
    }

    pub fn body(self, kind: &str) -> Op {
        self.body_as("application/json", schema(kind), true)
    }

    /// An empty body means `{}`.
    pub fn body_optional(self, kind: &str) -> Op {
        self.body_as("application/json", schema(kind), false)
    }

    pub fn body_as(mut self, media: &str, schema: Value, required: bool) -> Op {
        self.body =
            Some(json!({ "required": required, "content": { media: { "schema": schema } } }));
        self
    }

    pub fn ok(self, kind: &str, meaning: &str) -> Op {
        self.answer("200", &[("application/json", schema(kind))], meaning)
    }

    pub fn text(self, meaning: &str) -> Op {
        self.answer("200", &[("text/plain", json!({ "type": "string" }))], meaning)
    }

    /// Does not end by itself.
    pub fn stream(self, media: &str, meaning: &str) -> Op {
        self.answer("200", &[(media, json!({ "type": "string" }))], meaning)
    }

    pub fn answer(mut self, status: &str, contents: &[(&str, Value)], meaning: &str) -> Op {
        let contents = contents
            .iter()
            .map(|(media, schema)| ((*media).to_owned(), json!({ "schema": schema })));
        let mut answer = json!({ "description": meaning });
        if contents.len() > 0 {
            answer["content"] = contents.collect::<Map<_, _>>().into();
        }
        if matches!(status, "429" | "503") {
            answer["headers"] = json!({ "Retry-After": {
                "description": "seconds", "required": true,
                "schema": { "type": "integer", "minimum": 1 },
            }});
        }
        self.answers.push((status.to_owned(), answer));
        self
    }

    /// In the one shape of errors.
    pub fn errors(mut self, statuses: &[&str]) -> Op {
        for status in statuses {
            let error = [("application/json", schema("#Error"))];
            self = self.answer(status, &error, meaning(status));
        }
        self
    }

    /// The operation as OpenAPI has it, for the scope that its row in the table names.
    pub fn render(self, needs: Needs, listeners: &[&str]) -> Value {
        let described = |status: &str| self.answers.iter().any(|(known, _)| known == status);
        let usual: &[&str] = if needs == Needs::Nothing { &["403"] } else { &["401", "403"] };
        let missing: Vec<&str> =
            usual.iter().copied().filter(|status| !described(status)).collect();
        let path = self.path;
        let op = self.errors(&missing);
        let security = match needs {
            Needs::Nothing => json!([]),
            _ => json!([{ "bearer": [] }, { "x-api-key": [] }, { "basic": [] }]),
        };
        let mut parameters: Vec<Value> =
            path.split('{').skip(1).filter_map(|rest| parameter(path, rest)).collect();
        parameters.extend(op.queries);
        let mut rendered = json!({
            "tags": [op.tag],
            "operationId": operation_id(op.method, path),
            "summary": op.summary,
            "x-wharf-scope": needs.as_str(),
            "x-wharf-listeners": listeners,
            "security": security,
            "parameters": parameters,
        });
        if let Some(body) = op.body {
            rendered["requestBody"] = body;
        }
        rendered["responses"] = op.answers.into_iter().collect::<Map<_, _>>().into();
        rendered
    }
}

pub fn meaning(status: &str) -> &'static str {
    match status {
        "400" => "what was sent cannot be used; the message says which part, and how it should be",
        "401" => "keys are configured, and none or an unknown one was sent",
        "403" => "the key lacks the scope, or may not use this model; or a foreign web page asks",
        "404" => "not known here; for models with the nearest names",
        "408" => "the body came too slowly",
        "409" => "not in this state; the message says what to do instead",
        "413" => "the body is too large",
        "429" => "too many requests, of this key or for this model",
        "499" => "cancelled by an operator",
        "502" => "the engine closed the connection, or what it said cannot be used",
        "503" => "not now: the cause, and when to try again",
        "507" => "this model can never fit; the message says what would help",
        "504" => "not within the time that was allowed; what was begun goes on",
        _ => "an error",
    }
}

/// `name}/load` → the parameter `name`.
fn parameter(path: &str, rest: &str) -> Option<Value> {
    let name = rest.split('}').next()?;
    let (schema, meaning) = match name {
        "name" | "model" => {
            (schema("name"), "a model's name or alias; `/` and `:` may stand in it, encoded or not")
        }
        "source" => (schema("name"), "`proxy` (Wharf itself), `upstream` (all engines) or a model"),
        "path" => (json!({ "type": "string" }), "a path of the engine; slashes are not encoded"),
        _ if path.starts_with("/api/") => (json!({ "type": "integer", "minimum": 0 }), "a number"),
        _ => (json!({ "type": "string" }), "an id"),
    };
    Some(json!({
        "name": name, "in": "path", "required": true, "schema": schema, "description": meaning,
    }))
}

/// `POST /models/{name}/load` → `post_models_name_load`
fn operation_id(method: &str, path: &str) -> String {
    let words = path.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let mut id = method.to_ascii_lowercase();
    for word in words {
        id.push('_');
        id.push_str(word);
    }
    // `/upstream` and `/upstream/`
    if path.len() > 1 && path.ends_with('/') {
        id.push_str("_slash");
    }
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_become_schemas() {
        for (kind, expected) in [
            ("string", json!({ "type": "string" })),
            ("[#A]", json!({ "type": "array", "items": { "$ref": "#/components/schemas/A" } })),
            ("{number}", json!({ "type": "object", "additionalProperties": { "type": "number" } })),
            ("a|b", json!({ "type": "string", "enum": ["a", "b"] })),
            ("time?", json!({ "anyOf": [schema("time"), { "type": "null" }] })),
        ] {
            assert_eq!(schema(kind), expected, "{kind}");
        }
        let object = object(&[("a", "string", ""), ("b?", "any", "why")]);
        assert_eq!(object["required"], json!(["a"]));
        assert_eq!(object["properties"]["b"], json!({ "description": "why" }));
    }

    #[test]
    fn ids_of_operations_are_words() {
        assert_eq!(
            operation_id("POST", "/models/{name}/extend-ttl"),
            "post_models_name_extend_ttl"
        );
        assert_eq!(operation_id("GET", "/upstream/"), "get_upstream_slash");
    }
}
