"""s3.py METHOD PATH: makes a request of S3 with signature version 4, the body from standard input,
and prints the status, the headers and the body. s3.py presign PATH SECONDS: prints a presigned URL.

The environment has ENDPOINT, ACCESS_KEY and SECRET_KEY. Standard library only.
"""
import datetime
import hashlib
import hmac
import http.client
import os
import sys
import urllib.parse

endpoint = urllib.parse.urlsplit(os.environ["ENDPOINT"])
access, secret = os.environ["ACCESS_KEY"], os.environ["SECRET_KEY"]
now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
scope = f"{now[:8]}/us-east-1/s3/aws4_request"
unsigned = "UNSIGNED-PAYLOAD"


def canonical(query):
    pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
    quote = lambda text: urllib.parse.quote(text, safe="-_.~")
    return "&".join(sorted(f"{quote(key)}={quote(value)}" for key, value in pairs))


def signature(method, path, query, headers):
    names = ";".join(sorted(headers))
    lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    request = "\n".join([method, path, canonical(query), lines, names, unsigned])
    text = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(request.encode()).hexdigest()])
    key = ("AWS4" + secret).encode()
    for part in scope.split("/") + [text]:
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return names, key.hex()


if sys.argv[1] == "presign":
    path, _, query = sys.argv[2].partition("?")
    parts = {
        "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
        "X-Amz-Credential": f"{access}/{scope}",
        "X-Amz-Date": now,
        "X-Amz-Expires": sys.argv[3],
        "X-Amz-SignedHeaders": "host",
    }
    query = "&".join(filter(None, [query, urllib.parse.urlencode(parts)]))
    _, signed = signature("GET", path, query, {"host": endpoint.netloc})
    print(f"{endpoint.geturl()}{path}?{query}&X-Amz-Signature={signed}")
    sys.exit()

method, target = sys.argv[1], sys.argv[2]
path, _, query = target.partition("?")
headers = {"host": endpoint.netloc, "x-amz-date": now, "x-amz-content-sha256": unsigned}
names, signed = signature(method, path, query, headers)
headers["authorization"] = (
    f"AWS4-HMAC-SHA256 Credential={access}/{scope}, SignedHeaders={names}, Signature={signed}"
)
connection = http.client.HTTPConnection(endpoint.netloc, timeout=30)
connection.request(method, target, sys.stdin.buffer.read(), headers)
answer = connection.getresponse()
body = answer.read()
lines = [str(answer.status)] + [f"{name.lower()}: {value}" for name, value in answer.getheaders()]
sys.stdout.buffer.write("\n".join(lines + ["", ""]).encode() + body)
sys.exit(0 if answer.status < 300 else 1)
