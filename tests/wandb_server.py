"""A stand-in for W&B's server, as far as uploads go: it keeps what it is sent, with the answers that wandb 0.31 needs.

What the real server makes of it, what it does with a run that it has, and how pages look, is not in here.
"""

import gzip
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        data, answer = self.body(), {}
        if self.path.endswith("/graphql"):
            asked = json.loads(data)
            name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
            answer = {"data": self.server.answer(name, asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.stream(json.loads(data).get("files") or {})
        self.reply(answer)

    def do_PUT(self):
        self.server.files[self.path.removeprefix("/")] = self.body()
        self.reply({})

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def reply(self, answer):
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    """`with Server() as server:` answers at `server.url`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = {}  # where they were put -> bytes
        self.lines = {}  # file of a run -> its lines by number
        self.runs = {}  # id -> what was last said of it
        self.artifacts = set()  # committed
        self.views = []
        self.unknown = set()  # questions without an answer

    def handle_error(self, *_):
        """Whoever goes away in the middle is done."""

    def __enter__(self):
        Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def stream(self, files):
        for name, part in files.items():
            lines = self.lines.setdefault(name, {})
            lines |= enumerate(part["content"], part["offset"])

    def answer(self, name, given):
        def to(*place):
            return "/".join((self.url, *place))

        match name:
            case "ArtifactType":  # of a name that is to be: new
                return {"project": None}
            case "Viewer" | "GetViewer" | "GetDefaultEntity":
                user = dict.fromkeys(("id", "name", "username", "entity"), "somebody")
                return {"viewer": user | {"admin": False, "flags": "{}", "apiKeys": None, "teams": {"edges": []}}}
            case "UpsertView2":
                self.views.append(given)
                return {"upsertView": {"view": {"id": "view", "name": given["name"]}, "inserted": True}}
            case "UpsertBucket":
                self.runs[given["name"]] = self.runs.get(given["name"], {}) | {k: v for k, v in given.items() if v}
                entity = {"id": "entity", "name": given["entity"] or "somebody"}
                project = {"id": "project", "name": given["project"], "entity": entity}
                run = {"id": "run", "name": given["name"], "displayName": given["displayName"], "project": project}
                return {"upsertBucket": {"bucket": run, "inserted": True}}
            case "CreateRunFiles":
                files = [{"name": file, "uploadUrl": to("run", file)} for file in given["files"]]
                return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
            case "CreateArtifact":
                name = given["input"]["artifactCollectionName"]
                artifact = {"id": name, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
                return {"createArtifact": {"artifact": artifact}}
            case "CreateArtifactManifest":
                file = {"id": "file", "uploadUrl": to("manifest", given["artifactID"]), "uploadHeaders": []}
                return {"createArtifactManifest": {"artifactManifest": {"id": "manifest", "file": file}}}
            case "CreateArtifactFiles":
                nodes = [
                    {"id": file["name"], "name": file["name"], "displayName": file["name"], "uploadHeaders": []}
                    | {"uploadUrl": to("artifact", file["artifactID"], file["name"])}
                    | {"artifact": {"id": file["artifactID"]}}
                    for file in given["input"]["artifactFiles"]
                ]
                return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
            case "CommitArtifact":
                self.artifacts.add(given["artifactID"])
                return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": ""}}}
        self.unknown.add(name)
        return {}
