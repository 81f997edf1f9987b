"""azure.py PATH: makes a signed PUT of Azure's blob service to the account of azurite, the body
from standard input. PATH is /CONTAINER?restype=container, or /CONTAINER/BLOB.

The environment has ENDPOINT and KEY. Standard library only.
"""
import base64
import datetime
import hashlib
import hmac
import http.client
import os
import sys
import urllib.parse

endpoint = urllib.parse.urlsplit(os.environ["ENDPOINT"])
account = endpoint.path.strip("/")
path, _, query = (endpoint.path + sys.argv[1]).partition("?")
body = sys.stdin.buffer.read()
own = {
    "x-ms-blob-type": "BlockBlob",
    "x-ms-date": datetime.datetime.now(datetime.timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT"),
    "x-ms-version": "2021-08-06",
}
# Authorize with Shared Key, Microsoft's documentation: of the eleven standard headers only the
# length is there, and it is left out if it is 0.
standard = ["", "", str(len(body) or ""), "", "", "", "", "", "", "", ""]
names = [f"{name}:{own[name]}" for name in sorted(own)]
resource = [f"/{account}{path}"] + [f"{k}:{v}" for k, v in sorted(urllib.parse.parse_qsl(query))]
text = "\n".join(["PUT"] + standard + names + resource)
key = base64.b64decode(os.environ["KEY"])
signature = base64.b64encode(hmac.new(key, text.encode(), hashlib.sha256).digest()).decode()
own["Authorization"] = f"SharedKey {account}:{signature}"
own["Content-Length"] = str(len(body))

connection = http.client.HTTPConnection(endpoint.netloc, timeout=60)
connection.request("PUT", path + ("?" + query if query else ""), body, own)
answer = connection.getresponse()
print(answer.status, answer.read().decode(errors="replace"))
sys.exit(answer.status != 201)
