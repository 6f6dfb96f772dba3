drawSharing(document.getElementById("map"), JSON.parse(document.getElementById("data").textContent));
